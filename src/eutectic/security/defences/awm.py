"""AWM: a soft mask on a merge's weights, learned against a universal perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eutectic.fusion._fit import Batches, backward, descend, held_out_loss
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence_from, expert_outputs
from eutectic.methods._method import Count, NonNegative, Positive
from eutectic.security.defences._defended import Climbing, Path, fill_with, merged, over, trained, tuned
from eutectic.task import Task

REFERENCE = "Chai & Chen, One-shot neural backdoor erasing via adversarial weight masking, NeurIPS 2022, arXiv:2207.04497"


def awm(
    steps: Count = 60,
    lr: Positive = 2e-3,
    safety: NonNegative = 1.0,
    sparsity: NonNegative = 0.1,
    inner_lr: Positive = 0.5,
    batch_size: Count = 8,
    patience: Count = 5,
    mode: str = "windows",
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Make some weights of a merge smaller, so that a universal perturbation changes its predictions least.

        θ = m ⊙ θ_m,     m in [0, 1] for each entry of a matrix, 1 for all other weights
        min_m  Σ_tasks  KL( p_k(x; θ_k) ‖ p(x; θ) ) + β max_z KL( p_k(x; θ_k) ‖ p(T_z(x); θ) ),     + γ mean(m)

    z moves by the sign of its gradient, in the passes that are taken anyway.  Unlike the mask of ``dam``, this one lies on
    weights, θ₀'s share of them included, and not on what experts added.  Needs unlabelled images.

    Args:
        steps: of Adam on m, at most; two batches of every task each.
        lr: Adam's.
        safety: β.
        sparsity: γ.
        inner_lr: by how much the parameters of a perturbation move in a step.
        batch_size: of each task.
        patience: stop when the loss on inputs held out, less its last term, was not better so many times in a row, each 20
            steps.
        mode: of the perturbations, see ``security.miner.MODES``.
        method: the merge that is defended.
        parameters: of that method.

    Source: Chai & Chen, NeurIPS 2022, arXiv:2207.04497.  Differs from the paper in that the perturbation is painted in
    windows instead of bounded by its sum and found anew, in the mean where the paper has the sum of m, and in the experts'
    predictions as labels.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network = over(method, parameters), models.network
        batches, loss = Batches(run, tasks, batch_size), divergence_from(expert_outputs(models, tasks, run))
        weights = fill_with(network, merged(models.base, models.experts, about))
        path = Path([weight for weight in weights if weight.requires_grad_(weight.ndim > 1).requires_grad])
        masks = {str(at): torch.ones_like(start) for at, start in enumerate(path.start)}
        triggers = Climbing(network, batches, run, mode, loss, inner_lr, safety)
        entries = sum(mask.numel() for mask in masks.values())

        def write() -> None:
            for mask, start, tau in zip(masks.values(), path.start, path.tau, strict=True):
                torch.mul(mask.clamp_(0, 1) - 1, start, out=tau)
            path.write(1.0)

        def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
            write()
            value = backward(network, batches, step, loss, run)
            triggers.backward(step)
            path.collect()
            pairs = zip(masks, path.tau, path.start, strict=True)
            return value, {name: slope_of(tau) * start + sparsity / entries for name, tau, start in pairs}

        def criterion() -> float:
            write()
            return held_out_loss(network, batches, loss, run) + triggers.held_out()

        found = descend("mask", masks, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
        masks = found.tensors
        write()
        mean = sum(float(mask.sum(dtype=torch.float64)) for mask in masks.values()) / entries
        return trained(models, about | {"mean": mean, "history": found.history})

    return Fusion(fit, tuned)


def slope_of(tau: Tensor) -> Tensor:
    """The gradient that a path has collected."""
    assert tau.grad is not None
    return tau.grad
