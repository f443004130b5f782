"""NuSLERP column by column: every column of a matrix walks its own great circle."""

from __future__ import annotations

from torch import Tensor

from eutectic.methods._method import Method, Scope, Site, Stats
from eutectic.methods.nuslerp import Pair
from eutectic.methods.nuslerp_rows import nuslerp_rows

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Shoemake, SIGGRAPH 1985"


def nuslerp_columns(weights: Pair | None = None) -> Method:
    """SLERP with a weight for each of the two experts, each column (what lies along the first axis) as one vector.

        θ[:, j] = slerp(θ₁[:, j], θ₂[:, j]; t),   t = w₂ / (w₁ + w₂)

    Takes exactly two experts and no base (given one, it is ignored).  A tensor of one axis is one column.

    Args:
        weights: [w₁, w₂]; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: mergekit's ``nuslerp`` with ``nuslerp_flatten: false`` and ``nuslerp_row_wise: true`` (Goddard et al., 2024,
    arXiv:2403.13257), which in spite of its name takes columns.  Differs from mergekit as ``nuslerp`` does.
    """
    rows = nuslerp_rows(weights)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        columns_K = x_K.flatten(2).mT if x_K.ndim > 2 else x_K.reshape(len(x_K), 1, -1)
        return rows.apply(columns_K, site, stats).T.reshape(x_K.shape[1:])

    return Method(apply, Scope.TENSOR, space="weight", experts=(2, 2))
