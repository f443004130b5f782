"""Model breadcrumbs: drop the largest and the smallest entries of each task vector, and add the rest."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, chain
from eutectic.methods._transforms import band, weighted_sum

REFERENCE = "Davari and Belilovsky, Model breadcrumbs, ECCV 2024, arXiv:2312.06795"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.15, 0.2, 0.3, 0.4)}


def breadcrumbs(
    density: Fraction | list[Fraction] = 0.1,
    gamma: Fraction = 0.01,
    scale: Finite = 0.3,
    weights: list[Finite] | None = None,
) -> Method:
    """Mask outliers and small changes, tensor by tensor, and add what is left.

        θ = θ₀ + λ Σ wₖ mₖ ⊙ τₖ,   mₖ = 1 for the ranks  γN < rank ≤ γN + pN  of |τₖ|, 1 being the largest of the tensor's N

    Args:
        density: p, the fraction of a tensor that is kept, 0 to 1; one for all experts or one each.  The paper's 1 − β − γ.
        gamma: γ, the fraction of largest entries that is dropped, 0 to 1; with density 1 at most.
        scale: λ, the paper's α.
        weights: wₖ, one number an expert, in their order; all 1 if left out.

    Raises:
        ParameterError: density and gamma sum to more than 1, or the lists differ in length.

    Source: Davari and Belilovsky, ECCV 2024, arXiv:2312.06795, the sparse mask and its merge.  γN and pN are rounded, pN to 1
    at least; entries that tie with either end are kept.  Differs from the authors' code, which ranks within rows.  Differs
    from mergekit, which keeps nothing of a tensor where γN is below 1, as with gamma 0 or in small tensors, and which
    silently lowers a gamma that does not fit.
    """
    return chain(band(density, gamma), weighted_sum(scale if weights is None else [scale * weight for weight in weights]))
