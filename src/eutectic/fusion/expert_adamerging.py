"""AdaMerging taught by the experts: coefficients that make the merged model predict what each task's expert predicts."""

from __future__ import annotations

from typing import Any

from eutectic.fusion._coefficients import Per, fitted_to
from eutectic.fusion._fusion import Fusion
from eutectic.fusion._losses import divergence_from, expert_outputs
from eutectic.methods._method import Count, Finite, Positive

REFERENCE = "Chen et al., SAMerging, 2025, arXiv:2512.21288; Jung et al., SyMerge, ICML 2026, arXiv:2412.19098"


def expert_adamerging(
    per: Per = "tensor",
    init: Finite = 0.3,
    steps: Count = 100,
    lr: Positive = 2e-2,
    batch_size: Count = 8,
    patience: Count = 5,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Fit the coefficients of the task vectors to the experts' own soft outputs on unlabelled inputs.

        θˡ = θ₀ˡ + Σₖ λₖˡ T(τₖ)ˡ        min_λ  Σₖ  mean_x  KL( p(· | x; θₖ) ‖ p(· | x; θ) )

    Each task's expert is the one of its name; its outputs are computed once.

    Args:
        per: one λ for each expert and tensor, or one for each expert.
        init: λ at the beginning.
        steps: of Adam, at most; one batch of every task each.
        lr: Adam's.
        batch_size: of each task.
        patience: stop when the divergence on inputs held out was not better so many times in a row, each 20 steps.
        method: whose weighted sum is fitted.
        parameters: of that method.

    Source: the core that SAMerging (arXiv:2512.21288, 2025) and SyMerge (arXiv:2412.19098, ICML 2026) have in common.  Differs
    from the papers in that it neither looks for a flat minimum, as the first, nor tunes a layer of each task, as the second.
    """
    return fitted_to(
        lambda models, tasks, run: divergence_from(expert_outputs(models, tasks, run)),
        per=per,
        init=init,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        patience=patience,
        method=method,
        parameters=parameters,
    )
