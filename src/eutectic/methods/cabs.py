"""CABS: one expert after the other, keep the largest few of every block, where no expert before it did."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.errors import ParameterError
from eutectic.methods._method import Count, Finite, Method, Scope, Site, Stats, chain
from eutectic.methods._transforms import as_rows, weighted_sum

REFERENCE = "Yang et al., CABS: conflict-aware and balanced sparsification, ICML 2025, arXiv:2503.01874"
#: candidates for a choice on validation data
GRID = {"scale": (0.25, 0.5, 0.75, 1.0, 1.5)}


def cabs(n: Count = 64, m: Count = 256, scale: Finite = 1.0, weights: list[Finite] | None = None) -> Method:
    """Prune the task vectors to n of every m entries, in turn and without overlap, and add them.

        k = 1, 2, …:   mₖ = the n largest |τₖ| of each block of m, outside of m₁ ∪ … ∪ mₖ₋₁,   θ = θ₀ + λ Σ wₖ mₖ ⊙ τₖ

    The order of the experts matters: the first has the first choice.

    Args:
        n: how many entries of a block each expert keeps, 1 to m.
        m: entries in a block, 1 or more.  With K experts, K · n ≤ m leaves a full choice to all.
        scale: λ.
        weights: wₖ, one number an expert, in their order (the paper's λₖ); all 1 if left out.

    Raises:
        ParameterError: n is larger than m.

    Source: Yang et al., ICML 2025, arXiv:2503.01874, Algorithm 1 (CA and BS).  Differs from the authors' code in its blocks,
    which start anew with each row and end with a short one (of l entries ⌈l n / m⌉ are kept; there they run through the
    tensor and a short last one is dropped), and in that an entry that an expert keeps but did not change stays free.
    Of equal magnitudes the first is kept.
    """
    if n > m:
        raise ParameterError(f"cabs: of {m} entries (m) it cannot keep {n} (n)")

    def prune(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        rows_K = as_rows(x_K, site)
        length = rows_K.shape[-1]
        blocks_K = torch.nn.functional.pad(rows_K, (0, -length % m)).unflatten(-1, (-1, m))
        quota = torch.full((blocks_K.shape[2], 1), n)
        if length % m:
            quota[-1] = -(-(length % m) * n // m)
        free = torch.ones_like(blocks_K[0], dtype=torch.bool)
        kept = []
        for x in blocks_K:
            size = torch.where(free, x.abs(), 0)
            rank = torch.argsort(torch.argsort(size, dim=-1, descending=True, stable=True), dim=-1)
            mask = (rank < quota) & (size > 0)
            kept.append(torch.where(mask, x, 0))
            free &= ~mask
        return torch.stack(kept).flatten(2)[..., :length].flatten(-2).reshape(x_K.shape)

    added = weighted_sum(scale if weights is None else [scale * weight for weight in weights])
    return chain(Method(prune, Scope.ROW), added)
