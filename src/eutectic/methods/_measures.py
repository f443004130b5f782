"""Streamed measurements shared by the methods: exact order statistics and reproducible inner products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eutectic.methods._method import Measure, Over, Site, Stats
from eutectic.methods._native import count_high, count_low, dots


def magnitude_bits(x: Tensor) -> Tensor:
    """The bits of the magnitude in float32, as int32: non-negative integers in the order of the magnitudes."""
    return x.float().view(torch.int32) & 0x7FFFFFFF


def kth_magnitude(density: float, over: Over) -> tuple[Measure, Measure]:
    """Per expert, the exact magnitude of rank max(1, round(density · N)) from the top; 0 < density ≤ 1.

    Stat ``threshold``: int32 ``[K]``, the threshold's bits; what is kept is ``magnitude_bits(x) >= threshold``.
    """

    def wanted(n_K: Tensor) -> Tensor:
        return torch.clamp((n_K.double() * density).round(), min=1).long()

    return order_statistics(flat, wanted, over)


def flat(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
    """The experts' entries, ``[K, n]``."""
    return x_K.reshape(len(x_K), -1)


class _High(NamedTuple):
    """Magnitudes of Q rows: their bits as they came while they are few, then how often each upper half occurs ``[Q, 2¹⁵]``."""

    held: list[Tensor]
    counts_QB: Tensor | None


class _Found(NamedTuple):
    """Per statistic, either its bits, or the upper half of its bits and its rank among the entries that share it."""

    bits_Q: Tensor | None
    high_Q: Tensor
    rest_Q: Tensor


def order_statistics(
    values: Callable[[Tensor, Site, Stats], Tensor],
    wanted: Callable[[Tensor], Tensor],
    over: Over,
    keys: tuple[str, str] = ("high", "threshold"),
) -> tuple[Measure, Measure]:
    """Exact order statistics of the magnitudes of ``values(x_K, site, stats)``, ``[Q, m]``, with m not above the chunk's n.

    ``wanted`` turns the number of values seen in each row, ``[Q]``, into ranks to look for, ``[R · Q]`` with the Q rows of a
    rank together; 1 is the largest, and 0 is above all of them.  Two histograms over the bits of float32, high half then
    low half, so that it streams in 0.8 MB of state a row and is equal, bit for bit, to sorting them all (of a tensor, or of
    the whole model).  The second key holds the bits of the statistics: int32 ``[R · Q]``, the bits of 0 if there were no
    values.
    """

    def high(state: _High, x_K: Tensor, site: Site, stats: Stats) -> _High:
        rows = values(x_K, site, stats).float().contiguous().view(torch.int32)
        return _poured(_High([*state.held, rows], state.counts_QB))

    def merge_high(a: _High, b: _High) -> _High:
        if a.counts_QB is None or b.counts_QB is None:
            return _poured(_High(a.held + b.held, b.counts_QB if a.counts_QB is None else a.counts_QB))
        return _High([], a.counts_QB.add_(b.counts_QB))

    def finish_high(state: _High) -> _Found:
        if state.counts_QB is None:
            held = torch.cat(state.held, dim=1) & 0x7FFFFFFF if state.held else torch.zeros(1, 0, dtype=torch.int32)
            rank_Q = wanted(torch.full((len(held),), held.shape[1]))
            bits = [_largest(held[at % len(held)], rank) for at, rank in enumerate(rank_Q.tolist())]
            return _Found(torch.tensor(bits, dtype=torch.int32), rank_Q, rank_Q)
        rank_Q = wanted(state.counts_QB.sum(1))
        return _Found(None, *_rank_from_top(state.counts_QB.repeat(len(rank_Q) // len(state.counts_QB), 1), rank_Q))

    def low(state: _Low, x_K: Tensor, site: Site, stats: Stats) -> _Low:
        found = stats[keys[0]]
        if found.bits_Q is not None:
            return _Low(found, state.counts_QB)
        rows = values(x_K, site, stats).float().contiguous().view(torch.int32)
        counts = torch.zeros(len(found.high_Q), 1 << 16, dtype=torch.int64) if state.counts_QB is None else state.counts_QB
        for at, (bin_, row) in enumerate(zip(found.high_Q.tolist(), counts, strict=True)):
            count_low(rows[at % len(rows)], bin_, row)
        return _Low(found, counts)

    def merge_low(a: _Low, b: _Low) -> _Low:
        if a.counts_QB is None or b.counts_QB is None:
            return a if b.found is None or a.counts_QB is not None else b
        return _Low(a.found, a.counts_QB.add_(b.counts_QB))

    def finish_low(state: _Low) -> Tensor:
        found, counts = state
        if found is None:
            return torch.zeros(1, dtype=torch.int32)
        if found.bits_Q is not None:
            return found.bits_Q
        if counts is None:
            return torch.zeros(len(found.high_Q), dtype=torch.int32)
        return (found.high_Q << 16 | _rank_from_top(counts, found.rest_Q)[0]).int()

    return (
        Measure(keys[0], lambda k: _High([], None), high, merge_high, finish_high, over),
        Measure(keys[1], lambda k: _Low(None, None), low, merge_low, finish_low, over),
    )


class _Low(NamedTuple):
    """What the first histogram found, and how often each lower half occurs among the entries that share it ``[R · Q, 2¹⁶]``."""

    found: _Found | None
    counts_QB: Tensor | None


#: magnitudes of a row that are kept as they are: sorting so few is cheaper than two histograms
_FEW = 1 << 16


def _poured(state: _High) -> _High:
    """Pour the magnitudes that are held into the histogram, once there is one, or once they are many."""
    held, counts_QB = state
    if counts_QB is None:
        if sum(rows.shape[1] for rows in held) <= _FEW:
            return state
        counts_QB = torch.zeros(len(held[0]), 1 << 15, dtype=torch.int64)
    for rows in held:
        for row, counts in zip(rows, counts_QB, strict=True):
            count_high(row, counts)
    return _High([], counts_QB)


def _largest(bits: Tensor, rank: int) -> int:
    """The rank-largest of a few; those of infinity and more above all of them, of 0 if there are none."""
    if rank == 0 or not len(bits):
        return 0 if rank else 0x7FFFFFFF
    at = max(0, len(bits) - rank)
    return int(np.partition(bits.numpy(), at)[at])


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
    return _products("gram", lambda k: [(i, j) for i in range(k) for j in range(i + 1)], over)


def squares(over: Over = "tensor") -> Measure:
    """Squared norms ‖x_k‖² of the experts: stat ``squares``, float64 ``[K]``, summed as in ``gram``."""
    return _products("squares", lambda k: [(i, i) for i in range(k)], over)


def _products(key: str, pairs_of: Callable[[int], list[tuple[int, int]]], over: Over) -> Measure:
    def observe(state: list[Tensor], x_K: Tensor, site: Site, stats: Stats) -> list[Tensor]:
        rows = x_K.reshape(len(x_K), -1)
        return [*state, torch.stack([dots(rows[i], rows[j]) for i, j in pairs_of(len(x_K))])]

    def finish(state: list[Tensor]) -> Tensor:
        # a sum of the exact kind: whatever the order, one rounding
        sums = torch.tensor([math.fsum(row) for row in torch.cat(state, dim=1).tolist()], dtype=torch.float64)
        if key == "squares":
            return sums
        k = math.isqrt(2 * len(sums))
        i, j = torch.tril_indices(k, k)
        whole = torch.zeros(k, k, dtype=torch.float64)
        whole[i, j] = whole[j, i] = sums
        return whole

    def init(k: int) -> list[Tensor]:
        return [torch.zeros(len(pairs_of(k)), 0, dtype=torch.float64)]

    return Measure(key, init, observe, lambda a, b: a + b, finish, over)


def row_gram(x_K: Tensor) -> Tensor:
    """Inner products of the experts' rows: ``[K, rows, n]`` → float64 ``[rows, K, K]``."""
    wide_K = x_K.double()
    return torch.stack([torch.stack([(a * b).sum(1) for b in wide_K], dim=1) for a in wide_K], dim=1)


def cosines(gram_KK: Tensor) -> Tensor:
    """The cosines of the angles between the vectors of a Gram matrix ``[*, K, K]``; 0 wherever one of the two is zero."""
    norms = gram_KK.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return (gram_KK * inverse[..., :, None] * inverse[..., None, :]).clamp(-1, 1)
