"""NuSLERP on task vectors, column by column."""

from __future__ import annotations

from eutectic.methods._method import Method
from eutectic.methods.nuslerp import Pair
from eutectic.methods.nuslerp_columns import nuslerp_columns

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Shoemake, SIGGRAPH 1985"


def nuslerp_columns_delta(weights: Pair | None = None) -> Method:
    """SLERP between the two experts' task vectors, each column (what lies along the first axis) as one vector.

        θ[:, j] = θ₀[:, j] + slerp(τ₁[:, j], τ₂[:, j]; t),   t = w₂ / (w₁ + w₂)

    Takes exactly two experts.  A tensor of one axis is one column.

    Args:
        weights: [w₁, w₂]; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: mergekit's ``nuslerp`` with a base model, ``nuslerp_flatten: false`` and ``nuslerp_row_wise: true`` (Goddard et
    al., 2024, arXiv:2403.13257).  Differs as ``nuslerp_columns`` does.
    """
    return nuslerp_columns(weights)._replace(space="delta")
