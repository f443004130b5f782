"""Streamed measurements shared by the methods: exact order statistics and reproducible inner products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eutectic.methods._method import BLOCK, Measure, Over, Site, Stats


def magnitude_bits(x: Tensor) -> Tensor:
    """The bits of the magnitude in float32, as int32: non-negative integers in the order of the magnitudes."""
    return x.float().view(torch.int32) & 0x7FFFFFFF


def kth_magnitude(density: float, over: Over) -> tuple[Measure, Measure]:
    """Per expert, the exact magnitude of rank max(1, round(density · N)) from the top; 0 < density ≤ 1.

    Two histograms over the bits of float32, high half then low half, so that it streams in 0.8 MB of state an expert
    and is equal, bit for bit, to sorting all N magnitudes (of a tensor, or of the whole model).  Stat ``threshold``:
    int32 ``[K]``, the threshold's bits; what is kept is ``magnitude_bits(x) >= threshold``.
    """

    def high(state: Tensor, x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        counts = [torch.bincount(magnitude_bits(x).flatten() >> 16, minlength=1 << 15) for x in x_K]
        return state + torch.stack(counts)

    def finish_high(counts_KB: Tensor) -> tuple[Tensor, Tensor]:
        wanted = torch.clamp((counts_KB.sum(1) * density).round(), min=1).long()
        return _rank_from_top(counts_KB, wanted)

    def low(state: tuple[Tensor, Any], x_K: Tensor, site: Site, stats: Stats) -> tuple[Tensor, Any]:
        counts, _ = state
        added = []
        for x, bin_ in zip(x_K, stats["high"][0], strict=True):
            bits = magnitude_bits(x).flatten()
            added.append(torch.bincount(bits[bits >> 16 == bin_] & 0xFFFF, minlength=1 << 16))
        return counts + torch.stack(added), stats["high"]

    def merge_low(a: tuple[Tensor, Any], b: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return a[0] + b[0], a[1] or b[1]

    def finish_low(state: tuple[Tensor, Any]) -> Tensor:
        counts, (bin_K, rest_K) = state
        return (bin_K << 16 | _rank_from_top(counts, rest_K)[0]).int()

    return (
        Measure("high", lambda k: torch.zeros(k, 1 << 15, dtype=torch.int64), high, torch.add, finish_high, over),
        Measure("threshold", lambda k: (torch.zeros(k, 1 << 16, dtype=torch.int64), None), low, merge_low, finish_low, over),
    )


def _rank_from_top(counts_KB: Tensor, wanted_K: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the bin that holds the element of rank ``wanted`` from the top, and its rank within that bin."""
    reached_KB = counts_KB.flip(1).cumsum(1).flip(1)  # elements in this bin or above
    bin_K = (reached_KB >= wanted_K[:, None]).sum(1) - 1
    above_K = (reached_KB.gather(1, bin_K[:, None]) - counts_KB.gather(1, bin_K[:, None]))[:, 0]
    return bin_K, wanted_K - above_K


def gram(over: Over = "tensor") -> Measure:
    """Inner products ⟨x_i, x_j⟩ of the experts: stat ``gram``, float64 ``[K, K]``.

    Each block of 4,096 elements is summed by itself and the blocks are added with one rounding, so the result is the
    same bits however the tensor was cut (at multiples of a block) and in whatever order it was seen.
    """

    def observe(state: list[Tensor], x_K: Tensor, site: Site, stats: Stats) -> list[Tensor]:
        flat = x_K.flatten(1).double()
        padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        return [*state, torch.stack([torch.stack([(a * b).sum(1) for b in padded]) for a in padded])]

    def finish(state: list[Tensor]) -> Tensor:
        blocks = torch.cat(state, dim=2)
        return torch.tensor([[math.fsum(cell.tolist()) for cell in row] for row in blocks], dtype=torch.float64)

    return Measure("gram", lambda k: [], observe, lambda a, b: a + b, finish, over)
