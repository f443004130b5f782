"""Concrete AdaMerging: a learned mask, and coefficients learned under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eutectic.checkpoint.base import Memory
from eutectic.fusion._coefficients import Per, equation_over, facts, fit_coefficients, weighted
from eutectic.fusion._concrete import ConcreteMask, Export, exported, fit_mask, named
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import entropy
from eutectic.methods._method import Count, Finite, NonNegative, Positive
from eutectic.task import Task

REFERENCE = "Tang et al., Concrete subspace learning based interference elimination, 2023, arXiv:2312.06173"


def concrete_adamerging(
    per: Per = "tensor",
    init: Finite = 0.3,
    mask_steps: Count = 60,
    mask_lr: Positive = 2e-3,
    inner_lr: NonNegative = 0.1,
    temperature: Positive = 0.5,
    steps: Count = 100,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    patience: Count = 5,
    export: Export = "mean",
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Learn one mask for all experts around one step of AdaMerging, then run AdaMerging under that mask.

        min_x  Σ_tasks entropy( θ₀ + m̂(x) ⊙ Σₖ λₖ′ τₖ ),     λ′ = λ₀ − η · Adam's first step at a sample of the mask
        then x stays, λ returns to λ₀, and   min_λ  Σ_tasks entropy( θ₀ + m̂ ⊙ Σₖ λₖ τₖ )

    Args:
        per: one λ for each expert and tensor ("layer-wise"), or one for each expert ("task-wise").
        init: λ₀.
        mask_steps: of Adam on the logits, at most; two batches of every task each.
        mask_lr: Adam's, on the logits.
        inner_lr: η, by which each λ moves in the inner step.
        temperature: T of the binary Concrete distribution.
        steps: of Adam on λ under the mask, at most.
        lr: Adam's, on λ.
        batch_size: of each task.
        patience: stop when the entropy of inputs held out was not better so many times in a row, each 20 steps.
        export: which mask is used in the end: the mean of the hard mask, the hard mask, or one seeded sample.
        method: whose weighted sum is masked and fitted.
        parameters: of that method.

    Source: Tang et al., 2023, arXiv:2312.06173, algorithm 2.  Differs from the paper in η, which is 1 there and throws λ out of
    its range, in that λ is reset before the merge that its gradient is taken at, and as ``concrete_task_arithmetic`` does.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches = Batches(run, tasks, batch_size)
        equation = equation_over(method, parameters, models, run)
        mask = ConcreteMask(equation, temperature, run.seed)
        start = torch.full(equation.shape, init, dtype=torch.float64)
        learned = fit_mask(
            mask,
            start,
            batches,
            entropy,
            run,
            steps=mask_steps,
            lr=mask_lr,
            inner_lr=inner_lr,
            patience=patience,
            export=export,
            per=per,
        )
        mask.logits = learned.tensors
        masks = exported(list(mask.logits.values()), export, temperature, run.seed)
        weights, found = fit_coefficients(
            equation, batches, entropy, run, per=per, init=init, steps=steps, lr=lr, patience=patience, mask=masks
        )
        about = facts(equation, method, parameters) | {"density": mask.density()}
        about |= {"history": found.history, "mask_history": learned.history}
        return Artefact(Memory({"weights": weights.float()} | named(equation, masks)), about)

    return Fusion(fit, weighted)
