"""Karcher mean: the point of the sphere nearest, along great circles, to all experts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eutectic.methods._method import Finite, Method
from eutectic.methods._sphere import spherical

REFERENCE = "Karcher, Riemannian center of mass, CPAM 1977; Buss and Fillmore, Spherical averages, TOG 2001"

NonNegative = Annotated[Finite, Field(ge=0)]


def karcher(weights: list[NonNegative] | None = None) -> Method:
    """Average the experts' directions by arc length and their norms by themselves, each tensor as one vector.

        û = argmin_u Σ aₖ ∠(u, θₖ)²,   θ = (Σ aₖ ‖θₖ‖) · û                                                 (aₖ = wₖ / Σ w)

    found by u ← exp_u Σ aₖ log_u θ̂ₖ from the normalised mean, until the step is below 10⁻⁸ (at most 100 steps; fine-tunes of
    one base need two or three).  Zero tensors count in the norm only.  Where the directions cancel, the straight mean
    Σ aₖ θₖ.  Takes no base (given one, it is ignored).

    Args:
        weights: wₖ ≥ 0, one number an expert, in their order; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: Karcher, 1977; the iteration is Algorithm A1 of Buss and Fillmore, ACM Transactions on Graphics 2001.  Differs
    from mergekit's ``karcher`` (max_iter 10, tol 10⁻⁵, equal weights): it iterates on the K × K inner products in float64,
    until it converges, instead of on the tensors in their own dtype.
    """
    return spherical(weights, steps=100)
