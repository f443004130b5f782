"""DAM: a merge under two masks, one for what the tasks share and one that hides what a perturbation reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.base import Memory
from eutectic.fusion._coefficients import facts, weighted
from eutectic.fusion._concrete import ConcreteMask, exported, logit_gradient, named
from eutectic.fusion._fit import Batches, backward, descend, held_out_loss
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence_from, expert_outputs, fill
from eutectic.fusion._weighted import Weighted
from eutectic.merge.view import Merged
from eutectic.methods._method import Count, NonNegative, Positive
from eutectic.security.defences._defended import Climbing, held_triggers
from eutectic.task import Task

REFERENCE = (
    "Yang et al., Mitigating the backdoor effect for multi-task model merging via safety-aware subspace, ICLR 2025, "
    "arXiv:2410.13910"
)


def dam(
    steps: Count = 120,
    lr: Positive = 2e-2,
    safety: NonNegative = 4.0,
    inner_lr: Positive = 0.5,
    temperature: Positive = 0.5,
    batch_size: Count = 8,
    patience: Count = 5,
    mode: str = "windows",
    mining: Count = 16,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Learn two masks on a merge: m₁ for what it predicts, m₂ also for how little a universal perturbation changes that.

        θ = θ₀ + m̂₁ ⊙ m̂₂ ⊙ (merge(θ₀, θ₁ … θ_K) − θ₀)
        L_perf = Σ_tasks KL( p(x | θ_k) ‖ p(x | θ) ),     L_safe = Σ_tasks max_z KL( p(x | θ_k) ‖ p(T_z(x) | θ) )
        m₁ ← ∇ L_perf,     m₂ ← ∇ (L_perf + w L_safe),     z ← sign of the gradient, in the pass that L_safe takes anyway

    z begins as a trigger that is mined on the merge, for the class that is easiest.

    θ_k is the task's own expert.  Needs unlabelled images.  Takes no label, no audit and no target class.

    Args:
        steps: of Adam on the logits of both masks, at most; two batches of every task each.
        lr: Adam's.
        safety: w.
        inner_lr: by how much the parameters of a perturbation move in a step.
        temperature: T of the binary Concrete distribution.
        batch_size: of each task.
        patience: stop when L_perf + w L_safe on inputs held out was not better so many times in a row, each 20 steps.
        mode: of the perturbations, see ``security.miner.MODES``.
        mining: steps of the miner, for perturbations to begin with.
        method: the merge that is masked.
        parameters: of that method.

    Source: Yang et al., ICLR 2025, arXiv:2410.13910: two masks, of which the authors' code has one.  Differs from the paper in
    that L_safe asks for the same prediction where theirs asks for a certain one, which a backdoor gives too; that the
    perturbation is painted on pixels where theirs, on normalised inputs, stays far below any trigger, and that it begins
    mined; in the experts as teachers; that coefficients are the merge's; and that masks are no random draws when they are used.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches, teacher = Batches(run, tasks, batch_size), expert_outputs(models, tasks, run)
        loss = divergence_from(teacher)
        source = Merged(method, models.base, models.experts, parameters or {})
        equation = Weighted(models.network, models.base, {"merge": source}, fixed=[1.0])
        ones = torch.ones(equation.shape, dtype=torch.float64)
        masks = [ConcreteMask(equation, temperature, run.seed + number) for number in range(2)]
        fill(equation.network, source)
        mined = {one.task: one.mined.z for one in held_triggers(equation.network, batches, run, mode, mining)}
        triggers = Climbing(equation.network, batches, run, mode, loss, inner_lr, safety, start=mined)

        def slopes(samples: Sequence[Sequence[Tensor]], which: int) -> dict[str, Tensor]:
            """∂L/∂x of one mask, of the gradient that the network has."""
            mask, other = masks[which], samples[1 - which]
            found = {}
            pairs = zip(equation.sites, equation.mask_gradient(ones), samples[which], other, mask.means, strict=True)
            for site, gradient, own, beside, mean in pairs:
                found[f"{which}/{site.name}"] = logit_gradient(gradient * beside, own, mean, temperature)
            return found

        def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
            samples = [mask.sample(step) for mask in masks]
            both = [a * b for a, b in zip(*samples, strict=True)]
            equation.write(ones, both)
            value = backward(equation.network, batches, step, loss, run)
            kept = [parameter.grad.clone() for parameter in parameters_of(equation)]
            found = slopes(samples, 0)
            for parameter, slope in zip(parameters_of(equation), kept, strict=True):
                parameter.grad.copy_(slope)
            triggers.backward(step)
            return value, found | slopes(samples, 1)

        def used() -> list[Tensor]:
            parts = [exported(list(mask.logits.values()), "mean", temperature, run.seed) for mask in masks]
            return [a * b for a, b in zip(*parts, strict=True)]

        def criterion() -> float:
            equation.write(ones, used())
            return held_out_loss(equation.network, batches, loss, run) + triggers.held_out()

        state = {f"{number}/{name}": x for number, mask in enumerate(masks) for name, x in mask.logits.items()}
        found = descend("masks", state, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
        for number, mask in enumerate(masks):
            mask.logits = {name: found.tensors[f"{number}/{name}"] for name in mask.logits}
        about = facts(equation, method, source.parameters) | {"history": found.history}
        return Artefact(Memory(named(equation, used())), about)

    return Fusion(fit, weighted)


def parameters_of(equation: Weighted) -> list[Any]:
    """The tensors that are fitted, with their gradients."""
    return [site.parameter for site in equation.sites]
