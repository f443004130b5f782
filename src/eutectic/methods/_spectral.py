"""One decomposition for all spectral methods, and which tensors they treat as matrices."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eutectic.methods._method import Method, Scope, Site, Stats
from eutectic.methods._threads import one_torch_thread
from eutectic.methods._transforms import total

#: Tensors that are tables rather than maps, by name: their task vectors are averaged, as vectors' are.
TABLES = ("*embed*", "*lm_head*", "*wte*", "*wpe*", "*.shared.weight")

#: bytes that a method takes beside the stacked task vectors, for each entry of them: about three copies in float64
WORKSPACE = 24


#: subspaces that a sketch is of; dimensions that each has beside those asked for; and how often one fits into the shorter side,
#: at least
BLOCKS, OVERSAMPLE, SHARE = 3, 4, 4


class Svd(NamedTuple):
    """x = U diag(s) Vᵀ without its null space: U ``[m, r]``, s ``[r]`` falling, Vh ``[r, n]``, r the numerical rank."""

    U: Tensor
    s: Tensor
    Vh: Tensor


def svd(x: Tensor, noise: float = 0.0, most: int | None = None) -> Svd:
    """Decompose ``[m, n]`` by the eigenvectors of its smaller Gram matrix in float64; only the ``most`` strongest directions.

    Squaring costs half of the digits of float64, which leaves float32's.  Directions below 10⁻⁶ of the largest singular
    value are float32's rounding and are dropped: low-rank task vectors have no arbitrary directions in their null space.
    So are those up to ``noise``, for differences of larger matrices, whose rounding they inherit.
    """
    if x.shape[0] > x.shape[1]:
        turned = svd(x.T, noise, most)
        return Svd(turned.Vh.T, turned.s, turned.U.T)
    wide = x.double()
    with one_torch_thread():
        squares, U = torch.linalg.eigh(wide @ wide.T)
    s = squares.clamp(min=0).sqrt().flip(0)
    rank = int((s[:most] > (1e-6 * s[:1]).clamp(min=noise)).sum())
    U, s = U.flip(1)[:, :rank], s[:rank]
    return Svd(U.to(x.dtype), s.to(x.dtype), ((U / s).T @ wide).to(x.dtype))


def svd_of_product(left: Tensor, right: Tensor, most: int | None = None) -> Svd:
    """The same of ``[m, r]`` times ``[r, n]``, which is not formed: QR of either, and the SVD of an r × r matrix in float64."""
    with one_torch_thread():
        (Q, R), (P, S) = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().T)
        U, s, Vh = torch.linalg.svd(R @ S.T, full_matrices=False)
        rank = int((s[:most] > 1e-6 * s[:1]).sum())
        found = Q @ U[:, :rank], s[:rank], Vh[:rank] @ P.T
    return Svd(*(part.to(left.dtype) for part in found))


def sketched(x: Tensor, most: int, seed: int, noise: float = 0.0) -> Svd:
    """The ``most`` strongest directions of ``[m, n]``, nearly; exactly, by ``svd``, where these are no small share of all.

    Those of x in the span of Q₁ = orth(xΩ), xxᵀQ₁ and (xxᵀ)²Q₁, for a random Ω with ``OVERSAMPLE`` more columns than are asked
    for.  What the result leaves of x, in the Frobenius norm, is within 1 % of the least that any matrix of its rank leaves: to
    that it is tested, over spectra that fall fast, slowly, and not at all; where that is float32's rounding of x it is not.

    Source: Musco and Musco, NeurIPS 2015, arXiv:1504.05477, algorithm 2; blocks are made orthogonal as they come, too.
    """
    if x.shape[0] > x.shape[1]:
        turned = sketched(x.T, most, seed, noise)
        return Svd(turned.Vh.T, turned.s, turned.U.T)
    width = most + OVERSAMPLE
    if SHARE * width > len(x):
        return svd(x, noise, most)
    with one_torch_thread():
        blocks = [x @ torch.randn(x.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)]
        for _ in range(BLOCKS - 1):
            blocks[-1] = torch.linalg.qr(blocks[-1])[0]
            blocks.append(x @ torch.linalg.qr(x.T @ blocks[-1])[0])
        Q = torch.linalg.qr(torch.cat(blocks, 1))[0]
        part = svd(Q.T @ x, noise, most)
        return part._replace(U=Q @ part.U)


def polar(x: Tensor) -> Tensor:
    """The orthonormal factor U Vᵀ of ``[m, n]``: the nearest matrix whose non-zero singular values are all 1."""
    found = svd(x)
    return found.U @ found.Vh


def filtered(x_K: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """From the sum of ``[K, m, n]`` towards WUDI's least-squares solution, direction by direction of their rows.

    With Cₖ = τₖᵀτₖ / ‖τₖ‖² and C = Σ Cₖ = V diag(λ) Vᵀ it is M₀ − M₀ V diag(f) Vᵀ + D V diag(f/λ) Vᵀ, where M₀ = Σ τₖ,
    D = Σ τₖ Cₖ and f = ``keep(λ)``, for λ falling: f = 1 everywhere minimises Σ ‖(M − τₖ) τₖᵀ‖² / ‖τₖ‖², f = 0 leaves M₀.
    """
    wide_K = x_K.double()
    size_K = wide_K.flatten(1).norm(dim=1).view(-1, 1, 1)
    unit_K = wide_K / torch.where(size_K > 0, size_K, 1)
    found = svd(unit_K.flatten(0, 1))  # its right singular vectors are V, its singular values √λ
    V, curve = found.Vh.T, found.s.square()
    f = keep(curve)
    start = wide_K.sum(0)
    pull = sum((unit @ (unit.T @ (wide @ V)) for unit, wide in zip(unit_K, wide_K, strict=True)), torch.zeros_like(start @ V))
    return (start + (pull * (f / curve) - start @ V * f) @ V.T).to(x_K.dtype)


def on_matrices(apply: Callable[[Tensor, float], Tensor], tables: Sequence[str] = TABLES, workspace: int = WORKSPACE) -> Method:
    """Apply ``([K, m, n], noise) → [m, n]`` to the task vectors of matrices; all other tensors get the experts' mean.

    ``noise`` is the site's: directions that are no stronger are rounding.
    """

    def whole(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        if not is_map(site, tables):
            return total(x_K) / len(x_K)
        with one_torch_thread():
            return apply(x_K, site.noise)

    scope_of = functools.partial(matrix_scope, tables=tables)
    return Method(whole, Scope.TENSOR, sited=True, scope_of=scope_of, workspace=workspace)


def matrix_scope(name: str, shape: tuple[int, ...], tables: Sequence[str] = TABLES) -> Scope:
    """A matrix must be seen as a whole, a tensor of another kind not."""
    return Scope.TENSOR if _is_map(name, shape, tuple(tables)) else Scope.ELEMENT


def is_map(site: Site, tables: Sequence[str] = TABLES) -> bool:
    """Whether a tensor is a matrix that maps vectors: two axes, both above 1, and no table by its name."""
    return _is_map(site.name, site.shape, tuple(tables))


@functools.lru_cache(maxsize=1 << 16)
def _is_map(name: str, shape: tuple[int, ...], tables: tuple[str, ...]) -> bool:
    return len(shape) == 2 and min(shape) > 1 and not any(fnmatch.fnmatchcase(name, table) for table in tables)
