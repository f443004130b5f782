"""Products with matrices that differ from sample to sample, W₀ + Σᵢ cᵢDᵢ, where what is merged never leaves the cache.

N = experts, B = samples, T = tokens, m × n = the shape of the matrix.  Some rows are merged at a time, for all samples, and
multiplied at once; for the gradient they are merged again.  Kept, a layer's B matrices would be B times its size, and their way
to memory and back would take longer than the products.  Merging costs as much as N tokens more.

``_products.c`` does the same for float32 on a CPU, in less time, where there was a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: entries of a matrix that are merged at a time, about, and rows and columns that the compiled loops take at once: sparse
#: experts are saved in tiles of these, so they stay; and tokens that the loops take at once
TILE, ROWS, DEPTH, LANES = 1 << 17, 12, 768, 8
#: for so many samples each merges sparse experts for itself; for more, the experts are unpacked once
FEW = 2


def _load() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("eutectic.fusion._products_loops")
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    try:
        sizes = tuple((ctypes.c_int64 * 3).in_dll(library, "eutectic_sizes"))
    except ValueError:
        sizes = ()
    if sizes != (ROWS, DEPTH, LANES):  # compiled of another version
        return None
    at, count = ctypes.c_void_p, ctypes.c_int64
    library.eutectic_panels.argtypes = [at, count, count, count, count, at]
    library.eutectic_per_sample.argtypes = [at, at, at, count, at, *[count] * 3, at, *[count] * 6, ctypes.c_int]
    library.eutectic_scatter.argtypes = [at, at, count, at, count, count, at, count]
    return library


#: None without a compiler, or if it compiled another version: then everything below is array operations
LIBRARY = _load()


def per_sample(x: Tensor, c: Tensor, weight: Tensor, deltas: Tensor) -> Tensor:
    """(W₀ + Σᵢ cᵢDᵢ) x for each sample: ``[B, T, n]`` and coefficients ``[B, N]`` → ``[B, T, m]``.

    Differentiable by x, c and W₀; D ``[N, m, n]`` is constant.
    """
    return _product(x, c, weight, _Dense(deltas.detach().contiguous()))


def sparse_per_sample(x: Tensor, c: Tensor, weight: Tensor, gaps: Tensor, values: Tensor, counts: Sequence[int]) -> Tensor:
    """``per_sample`` with experts as ``packed`` made them, of which only what is merged at the moment is ever unpacked."""
    counts = tuple(counts)
    return _product(x, c, weight, _Sparse(gaps.split(counts), values.detach().split(counts), c.shape[1]))


def pruned(delta: Tensor, density: float) -> Tensor:
    """A tensor with zeros for all but its entries above the (1 − density)-quantile of their magnitudes.

    Strictly above, and so none of a tensor of equal magnitudes, as in E-WEMoE (Shen et al., 2024, arXiv:2410.21804); with
    density 1 it is as it was.
    """
    if density == 1:
        return delta
    size = delta.abs()
    return torch.where(size > size.flatten().kthvalue(int((delta.numel() - 1) * (1 - density)) + 1).values, delta, 0)


def packed(deltas: Tensor, density: float) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The entries of D ``[N, m, n]`` that are left when each expert is ``pruned``: gaps, values, counts.

    An entry takes a value and one byte: how far it lies behind the one before, in the order of ``tiles``, in these of groups of
    ``ROWS`` rows, and in these of experts, rows and columns.  Where that is more than 255, zeros lie between.  ``counts`` are
    the entries of each tile.
    """
    deltas = torch.stack([pruned(delta, density) for delta in deltas])
    gaps, values, counts = list[Tensor](), list[Tensor](), list[int]()
    for part in tiles(deltas.shape[1:]):
        tile = _grouped(deltas[:, *part]).flatten()
        at = tile.nonzero()[:, 0]
        gap = at.diff(prepend=at.new_zeros(1))
        between = (gap - 1).clamp_min(0) // 255
        place, total = torch.arange(len(at), device=at.device) + between.cumsum(0), len(at) + int(between.sum())
        gap = (gap - 255 * between).byte()
        gaps.append(gap.new_full((total,), 255).index_copy(0, place, gap))
        values.append(deltas.new_zeros(total).index_copy(0, place, tile[at]))
        counts.append(total)
    return torch.cat(gaps), torch.cat(values), tuple(counts)


class Tile(NamedTuple):
    """Rows and columns of a matrix that are merged together."""

    rows: slice
    columns: slice


def tiles(shape: Sequence[int]) -> list[Tile]:
    """Those of a matrix of this shape, one column after the other, in each as near to an even number as it divides."""
    m, n = shape
    columns = [slice(start, min(start + DEPTH, n)) for start in range(0, n, DEPTH)]
    pairs = math.ceil(m * min(n, DEPTH) / (2 * TILE))
    step = math.ceil(m / (2 * pairs * ROWS)) * ROWS
    return [Tile(slice(start, min(start + step, m)), some) for some in columns for start in range(0, m, step)]


def _grouped(deltas: Tensor) -> Tensor:
    """``[N, rows, n]`` → ``[groups, N, ROWS, n]``, filled up with zeros."""
    return F.pad(deltas, (0, 0, 0, -deltas.shape[1] % ROWS)).unflatten(1, (-1, ROWS)).transpose(0, 1)


class _Part(NamedTuple):
    """What is to be merged for some samples: W ``[rows, n]``, and the D of N experts, or of none where that is done.

    Two experts lie ``stride`` entries apart, two rows ``row``, and two groups of ``ROWS`` rows ``group``.
    """

    samples: slice
    weight: Tensor
    deltas: Tensor
    experts: int
    stride: int
    row: int
    group: int


class _Experts(Protocol):
    def read(self, number: int, tile: Tile, weight: Tensor) -> Tensor:
        """Their entries in this tile, ``[N, rows, columns]``; W there is ``weight``."""
        ...

    def parts(self, number: int, tile: Tile, c: Tensor, weight: Tensor) -> Iterator[_Part]:
        """For all samples, or for one after the other."""
        ...


class _Dense(NamedTuple):
    deltas: Tensor

    def read(self, number: int, tile: Tile, weight: Tensor) -> Tensor:
        return self.deltas[:, *tile]

    def parts(self, number: int, tile: Tile, c: Tensor, weight: Tensor) -> Iterator[_Part]:
        D = self.deltas[:, *tile]
        yield _Part(slice(len(c)), weight, D, len(D), D.stride(0), D.stride(1), ROWS * D.stride(1))


class _Sparse(NamedTuple):
    gaps: Sequence[Tensor]
    values: Sequence[Tensor]
    experts: int

    def read(self, number: int, tile: Tile, weight: Tensor) -> Tensor:
        return self._groups(number, weight).transpose(0, 1).flatten(1)[:, : weight.numel()].unflatten(1, weight.shape)

    def parts(self, number: int, tile: Tile, c: Tensor, weight: Tensor) -> Iterator[_Part]:
        n = weight.shape[1]
        if len(c) > FEW:
            D = self._groups(number, weight)
            yield _Part(slice(len(c)), weight, D, self.experts, D.stride(1), n, D.stride(0))
            return
        for b, own in enumerate(c):
            merged = weight.clone(memory_format=torch.contiguous_format)
            self._add(number, own, ROWS * n, merged)
            yield _Part(slice(b, b + 1), merged, merged, 0, 0, 0, 0)

    def _groups(self, number: int, weight: Tensor) -> Tensor:
        found = weight.new_zeros(-(-len(weight) // ROWS), self.experts, ROWS * weight.shape[1])
        if _loops_take(found):
            self._add(number, found.new_ones(1), found.numel(), found)
            return found
        return found.flatten().scatter(0, self.gaps[number].cumsum(0, dtype=torch.int64), self.values[number]).view_as(found)

    def _add(self, number: int, c: Tensor, size: int, out: Tensor) -> None:
        gaps, values = self.gaps[number], self.values[number]
        _library().eutectic_scatter(
            gaps.data_ptr(), values.data_ptr(), len(gaps), c.data_ptr(), len(c), size, out.data_ptr(), out.numel()
        )


def _product(x: Tensor, c: Tensor, weight: Tensor, experts: _Experts) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # what is merged is as exact as its parts
        return _Product.apply(x.to(weight.dtype), c.to(weight.dtype), weight, experts)


class _Product(torch.autograd.Function):
    """y = (W₀ + Σᵢ cᵢDᵢ) x; of the gradient G: ∂x = (W₀ + Σᵢ cᵢDᵢ)ᵀ G, ∂cᵢ = ⟨G xᵀ, Dᵢ⟩, and ∂W₀ is the sum of G xᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, weight: Tensor, experts: _Experts) -> Tensor:
        ctx.save_for_backward(x, c, weight)
        ctx.experts = experts
        if _loops_take(x) and x.shape[1] > 1:
            return _loops(x, c.contiguous(), weight.contiguous(), experts)
        y = x.new_zeros(*x.shape[:2], len(weight))
        for number, tile in enumerate(tiles(weight.shape)):
            some = weight[tile]
            y[..., tile.rows] += _rows(x[..., tile.columns], c, some, experts.read(number, tile, some))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (G,) = gradients
        x, c, weight = ctx.saved_tensors
        by_x, by_c, by_weight = torch.zeros_like(x), torch.zeros_like(c), None
        if ctx.needs_input_grad[2]:
            by_weight = torch.zeros_like(weight)
        for number, tile in enumerate(tiles(weight.shape)):
            own, some, W = G[..., tile.rows], x[..., tile.columns], weight[tile]
            D = ctx.experts.read(number, tile, W)
            by_x[..., tile.columns].baddbmm_(own, _merged(c, W, D))
            outer = own.mT @ some
            by_c.addmm_(outer.flatten(1), D.flatten(1).mT)
            if by_weight is not None:
                by_weight[tile] = outer.sum(0)
        return by_x, by_c, by_weight, None


def _merged(c: Tensor, weight: Tensor, D: Tensor) -> Tensor:
    """Some rows of every sample's matrix, ``[B, rows, n]``."""
    return torch.addmm(weight.flatten(), c, D.flatten(1)).view(-1, *weight.shape)


def _rows(x: Tensor, c: Tensor, weight: Tensor, D: Tensor) -> Tensor:
    """``[B, T, rows]``.  Of samples of one token, every expert's output is cheaper than a matrix."""
    if x.shape[1] > 1:
        return x @ _merged(c, weight, D).mT
    each = x[:, 0] @ D.mT  # [N, B, rows]
    return (F.linear(x[:, 0], weight) + torch.einsum("bi,ibr->br", c, each))[:, None]


def _library() -> ctypes.CDLL:
    assert LIBRARY is not None
    return LIBRARY


def _loops_take(x: Tensor) -> bool:
    """Whether there are compiled loops, and they can take it."""
    return LIBRARY is not None and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _loops(x: Tensor, c: Tensor, weight: Tensor, experts: _Experts) -> Tensor:
    """The compiled loops; as many of them at a time as torch has threads."""
    (B, T, _), m = x.shape, len(weight)
    x, y, threads = x.contiguous(), x.new_empty(B, T, m), torch.get_num_threads()
    spread = map if threads == 1 else _threads(threads).map
    # one column of tiles after the other: its inputs stay in the cache, and what comes later is added
    for columns, column in groupby(enumerate(tiles(weight.shape)), lambda numbered: numbered[1].columns):
        some, n = x[..., columns], columns.stop - columns.start
        panels = x.new_empty(B, -(-T // LANES), n, LANES)

        def turn(part: tuple[Tensor, Tensor], n: int = n) -> None:
            _library().eutectic_panels(part[0].data_ptr(), len(part[0]), T, n, x.stride(1), part[1].data_ptr())

        def run(numbered: tuple[int, Tile], n: int = n, panels: Tensor = panels) -> None:
            number, tile = numbered
            for samples, W, D, N, stride, row, group in experts.parts(number, tile, c, weight[tile]):
                own, out = c[samples], y[samples, :, tile.rows]
                _library().eutectic_per_sample(
                    *(panels[samples].data_ptr(), own.data_ptr(), W.data_ptr(), W.stride(0), D.data_ptr(), stride, row, group),
                    *(out.data_ptr(), m, len(own), T, N, len(W), n, tile.columns.start > 0),
                )

        deque(spread(turn, zip(some.chunk(threads), panels.chunk(threads), strict=True)), maxlen=0)
        deque(spread(run, column), maxlen=0)
    return y


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "eutectic-products")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
