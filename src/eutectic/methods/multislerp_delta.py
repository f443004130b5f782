"""Multi-SLERP on task vectors: their mean on the sphere around the base."""

from __future__ import annotations

from eutectic.methods._method import Finite, Method
from eutectic.methods.multislerp import multislerp

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Buss and Fillmore, TOG 2001"


def multislerp_delta(weights: list[Finite] | None = None) -> Method:
    """Interpolate any number of task vectors on the sphere around the base, each tensor as one vector.

        θ = θ₀ + multislerp(τ₁, …, τ_K; w)

    Args:
        weights: wₖ, one number an expert, in their order; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: mergekit's ``multislerp`` with a base model (Goddard et al., 2024, arXiv:2403.13257).  Differs as ``multislerp``
    does: here the step on the tangent space is not zero.  Task vectors are far from parallel, so the difference shows.
    """
    return multislerp(weights)._replace(space="delta")
