"""Task arithmetic: add the task vectors to the base."""

from __future__ import annotations

from eutectic.methods._method import Finite, Method
from eutectic.methods._transforms import weighted_sum

REFERENCE = "Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv:2212.04089"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.15, 0.2, 0.3, 0.4)}


def task_arithmetic(scale: Finite = 0.3, weights: list[Finite] | None = None) -> Method:
    """Add the scaled sum of the task vectors to the base.

        θ = θ₀ + λ Σ wₖ τₖ

    Args:
        scale: λ; the paper chooses it on validation data, 0.3 for eight CLIP tasks.
        weights: wₖ, one number an expert, in their order; all 1 if left out.

    Source: Ilharco et al., ICLR 2023, arXiv:2212.04089, section 2.  Differs from the paper in that experts may be weighted.
    """
    return weighted_sum(scale if weights is None else [scale * weight for weight in weights])
