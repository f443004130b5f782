"""SCE: select the entries on which the experts differ, weigh the experts by their energy, erase minority signs."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from eutectic.methods._measures import magnitude_bits, order_statistics, squares
from eutectic.methods._method import Fraction, Method, Site, Stats, chain
from eutectic.methods._native import agree, spread
from eutectic.methods._transforms import elect, total

REFERENCE = "Wan et al., FuseChat: knowledge fusion of chat models, 2024, arXiv:2408.07990"


def sce(
    density: Fraction = 1.0,
    count: Literal["nearest", "down"] = "nearest",
    balanced: Literal["base", "positive"] = "base",
) -> Method:
    """Merge what varies most between the experts, weighted by each task vector's energy, without minority signs.

        S: keep the top ``density`` of the entries with var τₖ > 0, by var τₖ       C: ηₖ = ‖τₖ‖² / Σ ‖τⱼ‖², of what is kept
        E: drop τₖ[i] where its sign is not that of Σ τₖ[i]                           θ = θ₀ + Σ ηₖ τₖ / Σ ηₖ, over what is left

    All tensor by tensor.  An entry on which all experts agree to the bit has no variance: with density < 1 it stays the base's.

    Args:
        density: fraction of the varying entries that is merged; 1 merges all entries, 0 none.
        count: how density · n becomes a number of entries: the nearest, at least one; or rounded down, as in mergekit.
        balanced: what an entry gets whose Σ τₖ is exactly 0: the base's value, or, as in mergekit, the positive τₖ.

    Source: Wan et al., 2024, arXiv:2408.07990 (SCE), with the normalisation of the authors' code (mergekit's ``sce``,
    ``select_topk``).  Differs from that code in that ηₖ is exact however small the task vectors are (newer mergekit makes it
    uniform once the mean squares sum to less than 10⁻⁶), in entries whose sum is exactly 0 (see ``balanced``), and in
    variances that tie with the least, which are all kept.
    """
    mix = Method(functools.partial(_mix, balanced == "positive"), measures=(squares(),))
    return mix if density == 1 else chain(_select(density, count), mix)


def _mix(positive: bool, x_K: Tensor, site: Site, stats: Stats) -> Tensor:
    energy = stats["squares"]
    # a share too small for float32 matters only where nobody else is left, and there any number will do
    share = (energy / energy.sum().clamp(min=1e-300)).clamp(min=1e-20).tolist()
    if not positive:
        return agree(x_K, share)
    left_K = torch.where(total(x_K) == 0, x_K.clamp(min=0), elect().apply(x_K, site, {}))
    weight = total((left_K != 0).to(x_K.dtype), share)
    return torch.where(weight > 0, total(left_K, share) / weight, 0)


def _select(density: float, count: str) -> Method:
    if density == 0:
        return Method(lambda x_K, site, stats: torch.zeros_like(x_K))

    def varying(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        found = spread(x_K)
        return found[found > 0][None]

    def wanted(n: Tensor) -> Tensor:
        share = n.double() * density
        return (share.floor() if count == "down" else share.round().clamp(min=1)).long()

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        found = spread(x_K)
        return x_K * ((magnitude_bits(found) >= stats["threshold"]) & (found > 0))

    return Method(apply, measures=order_statistics(varying, wanted, "tensor"))
