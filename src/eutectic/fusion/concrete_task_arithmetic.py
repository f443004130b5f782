"""Concrete task arithmetic: one learned mask on the merged task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eutectic.checkpoint.base import Memory
from eutectic.fusion._coefficients import facts, weighted
from eutectic.fusion._concrete import ConcreteMask, Export, exported, fit_mask, named
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import entropy
from eutectic.fusion._weighted import Weighted
from eutectic.merge.view import Merged
from eutectic.methods._method import Count, Positive
from eutectic.task import Task

REFERENCE = "Tang et al., Concrete subspace learning based interference elimination, 2023, arXiv:2312.06173"


def concrete_task_arithmetic(
    steps: Count = 300,
    lr: Positive = 1e-2,
    temperature: Positive = 0.5,
    batch_size: Count = 16,
    patience: Count = 5,
    export: Export = "mean",
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Learn one mask, shared by the experts, under which a merge makes the least entropy on unlabelled inputs.

        θ = θ₀ + m̂ ⊙ (merge(θ₀, θ₁ … θ_K) − θ₀),     m̂ = m / mean(m) of each tensor,     m = σ((x + logistic noise) / T)

    Args:
        steps: of Adam on the logits x, at most; one batch of every task each.
        lr: Adam's.
        temperature: T of the binary Concrete distribution.
        batch_size: of each task.
        patience: stop when the entropy of inputs held out was not better so many times in a row, each 20 steps.
        export: which mask is used in the end: the mean of the hard mask, the hard mask, or one seeded sample.
        method: the merge that is masked: task arithmetic as in the paper, or any other on task vectors.
        parameters: of that method.

    Source: Tang et al., 2023, arXiv:2312.06173, algorithm 1.  Differs from the paper in that the mask is no random sample when
    it is used, in that it adapts on inputs that are not those of the test, stops early, and that m̂ ≤ 1,000.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches = Batches(run, tasks, batch_size)
        merged = Merged(method, models.base, models.experts, parameters or {})
        equation = Weighted(models.network, models.base, {"merge": merged}, run.storage, fixed=[1.0])
        mask = ConcreteMask(equation, temperature, run.seed)
        start = torch.ones(equation.shape, dtype=torch.float64)
        found = fit_mask(mask, start, batches, entropy, run, steps=steps, lr=lr, inner_lr=0.0, patience=patience)
        mask.logits = found.tensors
        masks = exported(list(mask.logits.values()), export, temperature, run.seed)
        about = facts(equation, method, merged.parameters) | {"history": found.history, "density": mask.density()}
        return Artefact(Memory(named(equation, masks)), about)

    return Fusion(fit, weighted)
