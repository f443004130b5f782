"""NuSLERP on task vectors, row by row."""

from __future__ import annotations

from eutectic.methods._method import Method
from eutectic.methods.nuslerp import Pair
from eutectic.methods.nuslerp_rows import nuslerp_rows

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Shoemake, SIGGRAPH 1985"


def nuslerp_rows_delta(weights: Pair | None = None) -> Method:
    """SLERP between the two experts' task vectors, each row (all but the first axis) as one vector.

        θ[i] = θ₀[i] + slerp(τ₁[i], τ₂[i]; t),   t = w₂ / (w₁ + w₂)

    Takes exactly two experts.  A tensor of one axis is one row.

    Args:
        weights: [w₁, w₂]; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: mergekit's ``nuslerp`` with a base model and ``nuslerp_flatten: false`` (Goddard et al., 2024,
    arXiv:2403.13257).  Differs as ``nuslerp_rows`` does.
    """
    return nuslerp_rows(weights)._replace(space="delta")
