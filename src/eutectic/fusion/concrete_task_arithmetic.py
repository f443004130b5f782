"""Concrete task arithmetic: one learned mask on the merged task vectors."""

from __future__ import annotations

from typing import Any

from eutectic.fusion._concrete import Export, masked
from eutectic.fusion._fusion import Fusion
from eutectic.fusion._losses import entropy
from eutectic.methods._method import Count, Positive

REFERENCE = "Tang et al., Concrete subspace learning based interference elimination, 2023, arXiv:2312.06173"


def concrete_task_arithmetic(
    steps: Count = 100,
    lr: Positive = 2e-3,
    temperature: Positive = 0.5,
    batch_size: Count = 8,
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
    return masked(
        lambda models, tasks, run: entropy,
        steps=steps,
        lr=lr,
        temperature=temperature,
        batch_size=batch_size,
        patience=patience,
        export=export,
        method=method,
        parameters=parameters,
    )
