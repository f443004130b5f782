"""DAM as its authors released it: one mask, which makes predictions certain with and without a faint perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eutectic.checkpoint.base import Memory
from eutectic.fusion._coefficients import facts, weighted
from eutectic.fusion._concrete import ConcreteMask, exported, named
from eutectic.fusion._fit import Batches, backward, descend, held_out_loss
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import entropy
from eutectic.fusion._weighted import Weighted
from eutectic.merge.view import Merged
from eutectic.methods._method import Count, NonNegative, Positive
from eutectic.security.defences._defended import Climbing
from eutectic.security.defences.dam import REFERENCE as PAPER
from eutectic.task import Task

REFERENCE = PAPER


def dam_single_mask(
    steps: Count = 60,
    lr: Positive = 2e-2,
    safety: NonNegative = 0.1,
    inner_lr: Positive = 0.5,
    temperature: Positive = 0.5,
    batch_size: Count = 8,
    patience: Count = 5,
    mode: str = "additive",
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Learn one mask on a merge, under which it is certain of clean inputs and of perturbed ones.

        θ = θ₀ + m̂ ⊙ (merge(θ₀, θ₁ … θ_K) − θ₀)
        m ← ∇ Σ_tasks  H( p(x | θ) ) + w H( p(T_z(x) | θ) ),     z ← ascent on  CE( p(T_z(x) | θ), argmax p(x | θ) )

    It is here to be compared with ``dam``: a network that takes triggered inputs for the attacker's class is certain of that,
    so that nothing in the second term speaks against a backdoor.  Needs unlabelled images.

    Args:
        steps: of Adam on the logits of the mask, at most; two batches of every task each.
        lr: Adam's.
        safety: w.
        inner_lr: by how much the parameters of a perturbation move in a step.
        temperature: T of the binary Concrete distribution.
        batch_size: of each task.
        patience: stop when the loss on inputs held out was not better so many times in a row, each 20 steps.
        mode: of the perturbations, see ``security.miner.MODES``; ``additive`` is about as faint as the released one.
        method: the merge that is masked.
        parameters: of that method.

    Source: the code released with Yang et al., ICLR 2025, arXiv:2410.13910, in the form with fixed coefficients, of which it
    has the settings alone.  Differs from it in that the perturbation is bounded in pixels, where there it is cut to the range
    of pixels after these were normalised; in fewer and larger steps; that the mask is no random draw when it is used; and that
    it adapts on inputs that are not those of the test.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches, source = Batches(run, tasks, batch_size), Merged(method, models.base, models.experts, parameters or {})
        equation = Weighted(models.network, models.base, {"merge": source}, fixed=[1.0])
        ones = torch.ones(equation.shape, dtype=torch.float64)
        mask, said = ConcreteMask(equation, temperature, run.seed), dict[str, Tensor]()

        def certain(task: Task, logits: Tensor, index: Tensor) -> Tensor:
            """The entropy of predictions, which the perturbation of the same samples is to change."""
            said[task.name] = logits.detach().argmax(1)
            return entropy(task, logits, index)

        def other(task: Task, logits: Tensor, index: Tensor) -> Tensor:
            return F.cross_entropy(logits, said[task.name])

        triggers = Climbing(equation.network, batches, run, mode, entropy, inner_lr, safety, other)

        def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
            sample = mask.sample(step)
            equation.write(ones, sample)
            value = backward(equation.network, batches, step, certain, run)
            triggers.backward(step)
            return value, mask.gradient(ones, sample)

        def used() -> list[Tensor]:
            return exported(list(mask.logits.values()), "mean", temperature, run.seed)

        def criterion() -> float:
            equation.write(ones, used())
            return held_out_loss(equation.network, batches, entropy, run) + triggers.held_out()

        found = descend("mask", mask.logits, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
        mask.logits = found.tensors
        about = facts(equation, method, source.parameters) | {"history": found.history, "density": mask.density()}
        return Artefact(Memory(named(equation, used())), about)

    return Fusion(fit, weighted)
