"""Low-rank changes ΔWᵢ = Bᵢ Aᵢ of one matrix in shared, lossless coordinates: ΔWᵢ = U Mᵢ Vᵀ, with small matrices Mᵢ.

U holds the left singular vectors of [ΔW₁ … ΔW_T] and V the right ones of [ΔW₁; …; ΔW_T], strongest first.  Neither a ΔW nor
these are formed: with B = [B₁ … B_T] and A = [A₁; …; A_T] they are B X and (Y A)ᵀ, and X, Y and Mᵢ follow from BᵀB and A Aᵀ.

Source: Panariello et al., "Accurate and efficient low-rank model merging in core space", NeurIPS 2025, arXiv:2509.17786.
Differs from the paper, whose bases are the singular vectors of the stacked factors [B₁ … B_T] and [A₁; …; A_T]: those depend on
how an adapter splits ΔW into B and A, and with them what a method makes of single entries; these depend on the ΔWᵢ alone.
U is also the basis of KnOTS (Stoica et al., ICLR 2025, arXiv:2410.19735), whose coordinates are Uᵀ ΔWᵢ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eutectic.methods._threads import one_torch_thread

#: Singular values up to this share of the largest are dropped: squared, they are among float64's rounding of BᵀB.
_ROUNDING = 1e-6


class Frame(NamedTuple):
    """U = B X and Vᵀ = Y A, and of each expert Uᵀ Bᵢ ``[k, rᵢ]`` and Aᵢ V ``[rᵢ, l]``: Mᵢ is their product.  All in float64."""

    X: Tensor
    Y: Tensor
    left_K: tuple[Tensor, ...]
    right_K: tuple[Tensor, ...]


def frame(B: Tensor, A: Tensor, ranks: Sequence[int]) -> Frame:
    """The frame of B ``[m, Σ rᵢ]`` and A ``[Σ rᵢ, n]``, in float64; of one direction at least, even if they are all zero."""
    with one_torch_thread():
        G, H = B.T @ B, A @ A.T
        X, Y = _basis(G, H, ranks), _basis(H, G, ranks).T
        return Frame(X, Y, (X.T @ G).split(list(ranks), 1), (H @ Y.T).split(list(ranks)))


def _basis(G: Tensor, H: Tensor, ranks: Sequence[int]) -> Tensor:
    """X with B X the left singular vectors of [B₁A₁ … B_T A_T], for G = BᵀB, and of H = A Aᵀ the blocks of single experts.

    With Aᵢ Aᵢᵀ = Lᵢ Lᵢᵀ they are those of B diag(L₁ … L_T), whose Gram matrix is W diag(s²) Wᵀ, and X = diag(L) W / s.
    """
    L = torch.block_diag(*(_root(block) for block in _blocks(H, ranks)))
    squares, W = torch.linalg.eigh(L.T @ G @ L)
    s = squares.clamp(min=0).sqrt().flip(0)
    k = max(1, int((s > _ROUNDING * s[:1]).sum()))
    return L @ W.flip(1)[:, :k] / torch.where(s > 0, s, 1)[:k]


def _blocks(H: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    ends = torch.tensor(ranks).cumsum(0).tolist()
    return [H[end - rank : end, end - rank : end] for end, rank in zip(ends, ranks, strict=True)]


def _root(x: Tensor) -> Tensor:
    """L with L Lᵀ = x, for x symmetric without negative eigenvalues."""
    squares, W = torch.linalg.eigh(x)
    return W * squares.clamp(min=0).sqrt()


class Thinned(NamedTuple):
    """Two factors whose product is nearest to a matrix, and, as ‖·‖², what it leaves of it and how large that is."""

    left: Tensor
    right: Tensor
    lost: float
    whole: float


def thinned(M: Tensor, rank: int) -> Thinned:
    """The best approximation of M, with the singular values in equal parts in both factors.

    Source: Eckart and Young, 1936.
    """
    with one_torch_thread():
        u, s, vh = torch.linalg.svd(M, full_matrices=False)
    root, squares = s[:rank].sqrt(), s.square()
    return Thinned(u[:, :rank] * root, vh[:rank] * root[:, None], float(squares[rank:].sum()), float(squares.sum()))
