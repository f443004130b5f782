"""NuSLERP row by row: every row of a matrix walks its own great circle."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._measures import cosines, row_gram
from eutectic.methods._method import Method, Scope, Site, Stats
from eutectic.methods._sphere import FLAT
from eutectic.methods.nuslerp import Pair, share

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Shoemake, SIGGRAPH 1985"


def nuslerp_rows(weights: Pair | None = None) -> Method:
    """SLERP with a weight for each of the two experts, each row (all but the first axis) as one vector.

        θ[i] = slerp(θ₁[i], θ₂[i]; t),   t = w₂ / (w₁ + w₂)

    Takes exactly two experts and no base (given one, it is ignored).  A tensor of one axis is one row.

    Args:
        weights: [w₁, w₂]; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: mergekit's ``nuslerp`` with ``nuslerp_flatten: false`` (Goddard et al., 2024, arXiv:2403.13257).  Differs from
    mergekit, beyond what ``nuslerp`` says, for three and more axes: there mergekit rotates along the last axis alone.
    """
    t = share(weights)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        cos = cosines(row_gram(x_K))
        both, cos = cos.diagonal(dim1=1, dim2=2).all(1), cos[:, 0, 1]
        sin = (1 - cos * cos).sqrt()
        omega = torch.atan2(sin, cos)
        arc = both & (sin >= FLAT)
        first = torch.where(arc, torch.sin((1 - t) * omega) / sin, 1 - t).to(x_K.dtype)
        second = torch.where(arc, torch.sin(t * omega) / sin, t).to(x_K.dtype)
        return first[:, None] * x_K[0] + second[:, None] * x_K[1]

    return Method(apply, Scope.ROW, space="weight", experts=(2, 2))
