"""Model breadcrumbs with TIES: drop the largest and the smallest entries, elect signs, average those that agree."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, chain
from eutectic.methods._transforms import agreeing_mean, band, scale_by

REFERENCE = "Davari and Belilovsky, Model breadcrumbs, ECCV 2024, arXiv:2312.06795"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def breadcrumbs_ties(
    density: Fraction | list[Fraction] = 0.1,
    gamma: Fraction = 0.01,
    scale: Finite = 1.0,
    weights: list[Finite] | None = None,
) -> Method:
    """Mask outliers and small changes as breadcrumbs does, then vote on signs and average as TIES does.

        τ̂ₖ = mₖ ⊙ τₖ,   mₖ = 1 for the ranks  γN < rank ≤ γN + pN  of |τₖ|, 1 being the largest of the tensor's N
        γₛ = sgn Σ τ̂ₖ,   θ = θ₀ + λ Σₐ wₖ τ̂ₖ / Σₐ |wₖ|,   a = { k : sgn τ̂ₖ = γₛ }

    Args:
        density: p, the fraction of a tensor that is kept, 0 to 1; one for all experts or one each.
        gamma: γ, the fraction of largest entries that is dropped, 0 to 1; with density 1 at most.
        scale: λ.
        weights: wₖ, one number an expert, in their order; equal if left out.  They weigh the mean and not the votes.

    Raises:
        ParameterError: density and gamma sum to more than 1, or the lists differ in length.

    Source: the mask of Davari and Belilovsky, ECCV 2024, arXiv:2312.06795, with the election and the mean of
    Yadav et al., NeurIPS 2023, arXiv:2306.01708; mergekit paired them.  Differs from mergekit in the mask as
    ``breadcrumbs`` does, and as ``dare_ties`` does in weights and mean.
    """
    return chain(band(density, gamma), agreeing_mean(weights), scale_by(scale))
