"""Model Stock filter by filter: every row has its own way from the base to the experts' mean."""

from __future__ import annotations

from torch import Tensor

from eutectic.methods._measures import row_gram
from eutectic.methods._method import Method, Scope, Site, Stats
from eutectic.methods._transforms import as_rows, total
from eutectic.methods.model_stock import ratio

REFERENCE = "Jang et al., Model stock: all we need is just a few fine-tuned models, ECCV 2024, arXiv:2403.19522"


def model_stock_rows() -> Method:
    """Interpolate between the base and the experts' mean, row by row (all but the first axis).

        θ[i] = θ₀[i] + tᵢ · mean τₖ[i],   tᵢ from the angles between the rows τₖ[i], as in ``model_stock``

    Takes two experts or more.  A tensor of one axis is one row.

    Source: Jang et al., ECCV 2024, arXiv:2403.19522, the filter-wise variant of section 4.  Differs from the paper as
    ``model_stock`` does; mergekit's ``filter_wise: true`` takes the last axis alone for a row, which differs for convolutions.
    """

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        rows_K = as_rows(x_K, site)
        share = ratio(row_gram(rows_K)) / len(x_K)
        return (total(rows_K) * share.to(x_K.dtype)[:, None]).view(x_K.shape[1:])

    return Method(apply, Scope.ROW, experts=(2, None))
