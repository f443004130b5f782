"""One decomposition for all spectral methods, and which tensors they treat as matrices."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eutectic.methods._method import Method, Scope, Site, Stats

#: Tensors that are tables rather than maps, by name: their task vectors are averaged, as vectors' are.
TABLES = ("*embed*", "*lm_head*", "*wte*", "*wpe*", "*.shared.weight")


class Svd(NamedTuple):
    """x = U diag(s) Vᵀ without its null space: U ``[m, r]``, s ``[r]`` falling, Vh ``[r, n]``, r the numerical rank."""

    U: Tensor
    s: Tensor
    Vh: Tensor


def svd(x: Tensor) -> Svd:
    """Decompose ``[m, n]`` by the eigenvectors of its smaller Gram matrix in float64.

    Squaring costs half of the digits of float64, which leaves float32's.  Directions below 10⁻⁶ of the largest singular
    value are float32's rounding and are dropped: low-rank task vectors have no arbitrary directions in their null space.
    """
    if x.shape[0] > x.shape[1]:
        turned = svd(x.T)
        return Svd(turned.Vh.T, turned.s, turned.U.T)
    wide = x.double()
    squares, U = torch.linalg.eigh(wide @ wide.T)
    s = squares.clamp(min=0).sqrt().flip(0)
    rank = int((s > 1e-6 * s[:1]).sum())
    U, s = U.flip(1)[:, :rank], s[:rank]
    return Svd(U.to(x.dtype), s.to(x.dtype), ((U / s).T @ wide).to(x.dtype))


def polar(x: Tensor) -> Tensor:
    """The orthonormal factor U Vᵀ of ``[m, n]``: the nearest matrix whose non-zero singular values are all 1."""
    found = svd(x)
    return found.U @ found.Vh


def on_matrices(apply: Callable[[Tensor], Tensor], tables: Sequence[str] = TABLES) -> Method:
    """Apply ``[K, m, n] → [m, n]`` to the task vectors of matrices; all other tensors get the mean over the experts."""

    def whole(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        is_map = x_K.ndim == 3 and min(x_K.shape[1:]) > 1 and not any(fnmatch.fnmatchcase(site.name, t) for t in tables)
        return apply(x_K) if is_map else x_K.mean(0)

    return Method(whole, scope=Scope.TENSOR)
