"""Streamed measurements shared by the methods: exact order statistics and reproducible inner products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eutectic.methods._method import BLOCK, Measure, Over, Site, Stats


def magnitude_bits(x: Tensor) -> Tensor:
    """The bits of the magnitude in float32, as int32: non-negative integers in the order of the magnitudes."""
    return x.float().view(torch.int32) & 0x7FFFFFFF


def kth_magnitude(density: float, over: Over) -> tuple[Measure, Measure]:
    """Per expert, the exact magnitude of rank max(1, round(density · N)) from the top; 0 < density ≤ 1.

    Stat ``threshold``: int32 ``[K]``, the threshold's bits; what is kept is ``magnitude_bits(x) >= threshold``.
    """

    def wanted(n_K: Tensor) -> Tensor:
        return torch.clamp((n_K.double() * density).round(), min=1).long()

    return order_statistics(lambda x_K, site, stats: x_K.reshape(len(x_K), -1), wanted, over)


def order_statistics(
    values: Callable[[Tensor, Site, Stats], Tensor],
    wanted: Callable[[Tensor], Tensor],
    over: Over,
    keys: tuple[str, str] = ("high", "threshold"),
) -> tuple[Measure, Measure]:
    """Exact order statistics of the magnitudes of ``values(x_K, site, stats)``, ``[Q, m]``, with m not above the chunk's n.

    ``wanted`` turns the number of values seen, ``[Q]``, into the rank that is looked for in each row, 1 being the
    largest.  Two histograms over the bits of float32, high half then low half, so that it streams in 0.8 MB of state a
    row and is equal, bit for bit, to sorting them all (of a tensor, or of the whole model).  The second key holds the
    bits of the statistics: int32 ``[Q]``, the bits of 0 if there were no values.
    """

    def high(state: Tensor, x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        counts = [torch.bincount(magnitude_bits(row) >> 16, minlength=1 << 15) for row in values(x_K, site, stats)]
        return state + torch.stack(counts)

    def finish_high(counts_QB: Tensor) -> tuple[Tensor, Tensor]:
        wanted_Q = wanted(counts_QB.sum(1))
        return _rank_from_top(counts_QB.expand(len(wanted_Q), -1), wanted_Q)

    def low(state: tuple[Tensor, Any], x_K: Tensor, site: Site, stats: Stats) -> tuple[Tensor, Any]:
        counts, _ = state
        added = []
        for row, bin_ in zip(values(x_K, site, stats), stats[keys[0]][0], strict=True):
            bits = magnitude_bits(row)
            added.append(torch.bincount(bits[bits >> 16 == bin_] & 0xFFFF, minlength=1 << 16))
        return counts + torch.stack(added), stats[keys[0]]

    def merge_low(a: tuple[Tensor, Any], b: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return a[0] + b[0], a[1] or b[1]

    def finish_low(state: tuple[Tensor, Any]) -> Tensor:
        counts, found = state
        if found is None:
            return torch.zeros(len(counts), dtype=torch.int32)
        bin_Q, rest_Q = found
        return (bin_Q << 16 | _rank_from_top(counts, rest_Q)[0]).int()

    # one row of zeros, which grows to Q rows with the first chunk
    return (
        Measure(keys[0], lambda k: torch.zeros(1, 1 << 15, dtype=torch.int64), high, torch.add, finish_high, over),
        Measure(keys[1], lambda k: (torch.zeros(1, 1 << 16, dtype=torch.int64), None), low, merge_low, finish_low, over),
    )


def _rank_from_top(counts_KB: Tensor, wanted_K: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the bin that holds the element of rank ``wanted`` from the top, and its rank within that bin."""
    reached_KB = counts_KB.flip(1).cumsum(1).flip(1)  # elements in this bin or above
    bin_K = torch.clamp((reached_KB >= wanted_K[:, None]).sum(1) - 1, min=0)  # 0 also where there is nothing to rank
    above_K = (reached_KB.gather(1, bin_K[:, None]) - counts_KB.gather(1, bin_K[:, None]))[:, 0]
    return bin_K, wanted_K - above_K


def gram(over: Over = "tensor") -> Measure:
    """Inner products ⟨x_i, x_j⟩ of the experts: stat ``gram``, float64 ``[K, K]``.

    Each block of 4,096 elements is summed by itself and the blocks are added with one rounding, so the result is the
    same bits however the tensor was cut (at multiples of a block) and in whatever order it was seen.
    """

    def observe(state: list[Tensor], x_K: Tensor, site: Site, stats: Stats) -> list[Tensor]:
        flat = x_K.reshape(len(x_K), -1).double()
        padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        return [*state, torch.stack([torch.stack([(a * b).sum(1) for b in padded]) for a in padded])]

    def finish(state: list[Tensor]) -> Tensor:
        blocks = torch.cat(state, dim=2)
        return torch.tensor([[math.fsum(cell.tolist()) for cell in row] for row in blocks], dtype=torch.float64)

    return Measure("gram", lambda k: [torch.zeros(k, k, 0, dtype=torch.float64)], observe, lambda a, b: a + b, finish, over)


def row_gram(x_K: Tensor) -> Tensor:
    """Inner products of the experts' rows: ``[K, rows, n]`` → float64 ``[rows, K, K]``."""
    wide_K = x_K.double()
    return torch.stack([torch.stack([(a * b).sum(1) for b in wide_K], dim=1) for a in wide_K], dim=1)


def cosines(gram_KK: Tensor) -> Tensor:
    """The cosines of the angles between the vectors of a Gram matrix ``[*, K, K]``; 0 wherever one of the two is zero."""
    norms = gram_KK.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return (gram_KK * inverse[..., :, None] * inverse[..., None, :]).clamp(-1, 1)
