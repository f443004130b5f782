"""TIES with a weighted sum: what of each trimmed task vector agrees with the elected signs, added up."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, Over, chain
from eutectic.methods._transforms import elect, trim, weighted_sum

REFERENCE = "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.3, 0.45, 0.7)}


def ties_sum(density: Fraction = 0.2, scale: Finite = 0.3, weights: list[Finite] | None = None, over: Over = "model") -> Method:
    """Keep the top ``density`` of each task vector, vote on signs by mass, add up those that agree.

        τ̂ₖ = trim(τₖ),   γ = sgn Σ τ̂ₖ,   θ = θ₀ + λ Σ wₖ τ̂ₖ [sgn τ̂ₖ = γ]

    It is linear in the weights: AdaMerging++ fits them.

    Args:
        density: fraction of entries that survives the trim.
        scale: λ.
        weights: wₖ, one number an expert, in their order; all 1 if left out.  They have no say in the vote.
        over: rank magnitudes over the whole model, or tensor by tensor.

    Source: Yadav et al., NeurIPS 2023, arXiv:2306.01708, whose code has the sum beside the mean of the paper; Yang et al.,
    ICLR 2024, arXiv:2310.02575, who weight it.  Differs from the paper in the sum.
    """
    return chain(
        trim(density, over), elect(), weighted_sum(scale if weights is None else [scale * weight for weight in weights])
    )
