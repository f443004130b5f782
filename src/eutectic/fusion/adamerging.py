"""AdaMerging: coefficients that make the merged model certain of its predictions."""

from __future__ import annotations

from typing import Any

from eutectic.fusion._coefficients import Per, fitted_to
from eutectic.fusion._fusion import Fusion
from eutectic.fusion._losses import entropy
from eutectic.methods._method import Count, Finite, Positive

REFERENCE = "Yang et al., AdaMerging: Adaptive model merging for multi-task learning, ICLR 2024, arXiv:2310.02575"


def adamerging(
    per: Per = "tensor",
    init: Finite = 0.3,
    steps: Count = 100,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    patience: Count = 5,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Fit the coefficients of the task vectors to unlabelled inputs, by minimising the entropy of the predictions.

        θˡ = θ₀ˡ + Σₖ λₖˡ T(τₖ)ˡ        min_λ  Σ_tasks  mean_x  −Σ_c p_c log p_c

    Args:
        per: one λ for each expert and tensor ("layer-wise"), or one for each expert ("task-wise").
        init: λ at the beginning.
        steps: of Adam, at most; one batch of every task each.
        lr: Adam's.
        batch_size: of each task.
        patience: stop when the entropy of inputs held out was not better so many times in a row, each 20 steps.
        method: whose weighted sum is fitted; ``ties_sum`` gives AdaMerging++.
        parameters: of that method.

    Source: Yang et al., ICLR 2024, arXiv:2310.02575, equations 5 to 7.  Differs from the paper in that it adapts on inputs that
    are not those of the test (protocol: transductive does as the paper did), stops early, and does not clamp λ.
    """
    return fitted_to(
        lambda models, tasks, run: entropy,
        per=per,
        init=init,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        patience=patience,
        method=method,
        parameters=parameters,
    )
