"""A Concrete mask taught by the experts: under it a merge predicts what each task's expert predicts."""

from __future__ import annotations

from typing import Any

from eutectic.fusion._concrete import Export, masked
from eutectic.fusion._fusion import Fusion
from eutectic.fusion._losses import divergence_from, expert_outputs
from eutectic.methods._method import Count, Positive

REFERENCE = (
    "Tang et al., Concrete subspace learning based interference elimination, 2023, arXiv:2312.06173; "
    "Chen et al., SAMerging, 2025, arXiv:2512.21288"
)


def expert_concrete(
    steps: Count = 100,
    lr: Positive = 2e-2,
    temperature: Positive = 0.5,
    batch_size: Count = 8,
    patience: Count = 5,
    export: Export = "mean",
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Learn one mask, shared by the experts, under which a merge predicts what each task's expert does on unlabelled inputs.

        θ = θ₀ + m̂(x) ⊙ (merge(θ₀, θ₁ … θ_K) − θ₀),        min_x  Σₖ  mean  KL( p(· | θₖ) ‖ p(· | θ) )

    Each task's expert is the one of its name; its outputs are computed once.

    Args:
        steps: of Adam on the logits x, at most; one batch of every task each.
        lr: Adam's.
        temperature: T of the binary Concrete distribution.
        batch_size: of each task.
        patience: stop when the divergence on inputs held out was not better so many times in a row, each 20 steps.
        export: which mask is used in the end: the mean of the hard mask, the hard mask, or one seeded sample.
        method: the merge that is masked.
        parameters: of that method.

    Source: the mask is that of Tang et al., 2023, arXiv:2312.06173, the teachers are those of Chen et al., 2025,
    arXiv:2512.21288.  Differs from both in the combination; from the first as ``concrete_task_arithmetic`` does.
    """
    return masked(
        lambda models, tasks, run: divergence_from(expert_outputs(models, tasks, run)),
        steps=steps,
        lr=lr,
        temperature=temperature,
        batch_size=batch_size,
        patience=patience,
        export=export,
        method=method,
        parameters=parameters,
    )
