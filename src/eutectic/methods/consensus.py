"""Consensus task arithmetic: keep what at least two tasks find important in the summed task vector."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._method import Count, Finite, Method, NonNegative, Site, Stats, chain
from eutectic.methods._transforms import count_of, each, scale_by, total

REFERENCE = "Wang et al., Localizing task information (TALL-masks), ICML 2024, arXiv:2405.07813"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.15, 0.2, 0.3, 0.4)}


def consensus(threshold: NonNegative | list[NonNegative] = 0.4, agree: Count = 2, scale: Finite = 0.3) -> Method:
    """Localize each task in the summed task vector by a mask, and drop what fewer than ``agree`` masks keep.

        τ = Σ τₖ,   mₖ = [ |τₖ| ≥ tₖ · |τ − τₖ| ],   θ = θ₀ + λ · [ Σ mₖ ≥ agree ] ⊙ τ

    The masks drop what is catastrophic (no task wants it) and, with 2, what is selfish (only one does).

    Args:
        threshold: tₖ, 0 or more; one for all experts or one each.  The paper chooses among 0.2 … 0.6 for each task.
        agree: how many masks must keep an entry, 1 or more; it takes as many experts at least.
        scale: λ, the paper's α.

    Raises:
        ParameterError: a list of thresholds is shorter than ``agree``.

    Source: Wang et al., ICML 2024, arXiv:2405.07813, the TALL-mask of section 3 and the consensus of section 4.  Differs from
    the paper in nothing but that the thresholds are given: choosing them takes data.
    """

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        merged = total(x_K)
        masks = [x.abs() >= t * (merged - x).abs() for x, t in zip(x_K, each(threshold, len(x_K)), strict=True)]
        return torch.where(torch.stack(masks).sum(0) >= agree, merged, 0)

    enough = Method(lambda x_K, site, stats: x_K, experts=(agree, None))
    return chain(enough, Method(apply, experts=count_of(threshold)), scale_by(scale))
