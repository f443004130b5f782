"""NuSLERP on task vectors: walk the great circle between two of them."""

from __future__ import annotations

from eutectic.methods._method import Method
from eutectic.methods.nuslerp import Pair, nuslerp

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Shoemake, SIGGRAPH 1985"


def nuslerp_delta(weights: Pair | None = None) -> Method:
    """SLERP between the two experts' task vectors, each tensor as one vector.

        θ = θ₀ + slerp(τ₁, τ₂; t),   t = w₂ / (w₁ + w₂)

    Takes exactly two experts.

    Args:
        weights: [w₁, w₂]; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: mergekit's ``nuslerp`` with a base model (Goddard et al., 2024, arXiv:2403.13257).  Differs as ``nuslerp`` does:
    where one task vector is zero the line is taken; weights that sum to zero are refused.
    """
    return nuslerp(weights)._replace(space="delta")
