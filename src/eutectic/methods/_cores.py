"""Low-rank changes ΔWᵢ = Bᵢ Aᵢ of one matrix in shared, lossless coordinates: ΔWᵢ = U Mᵢ Vᵀ, with small matrices Mᵢ.

U holds the left singular vectors of [ΔW₁ … ΔW_T] and V the right ones of [ΔW₁; …; ΔW_T], strongest first.  No ΔW is formed.

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

#: singular values up to this share of the largest are float64's rounding
_ROUNDING = 1e-12


class Frame(NamedTuple):
    """Bases U ``[m, k]`` and V ``[n, l]``, and of each expert Uᵀ Bᵢ ``[k, rᵢ]`` and Aᵢ V ``[rᵢ, l]``; all in float64."""

    U: Tensor
    V: Tensor
    left_K: tuple[Tensor, ...]
    right_K: tuple[Tensor, ...]


def frame(left_K: Sequence[Tensor], right_K: Sequence[Tensor]) -> Frame:
    """The frame of factors ``[m, rᵢ]`` and ``[rᵢ, n]``; of one direction at least, even if they are all zero."""
    ranks = [left.shape[1] for left in left_K]
    with one_torch_thread():
        (Q, R), (P, S) = (torch.linalg.qr(torch.cat([*x], 1).double()) for x in (left_K, [right.T for right in right_K]))
        R_K, S_K = R.split(ranks, 1), S.split(ranks, 1)
        # [ΔW₁ … ΔW_T] is Q [R₁S₁ᵀ …] diag(Pᵀ …), and Rᵢ Sᵢᵀ = (Rᵢ Lᵢ) Gᵢ, with Sᵢ = Gᵢᵀ Lᵢᵀ, has Gᵢ's rows orthonormal
        u, v = _basis(R_K, S_K), _basis(S_K, R_K)
        return Frame(Q @ u, P @ v, tuple(u.T @ R for R in R_K), tuple(S.T @ v for S in S_K))


def _basis(x_K: Sequence[Tensor], y_K: Sequence[Tensor]) -> Tensor:
    """The left singular vectors of [x₁y₁ᵀ … x_T y_Tᵀ], without its null space."""
    u, s, _ = torch.linalg.svd(torch.cat([x @ torch.linalg.qr(y, mode="r").R.T for x, y in zip(x_K, y_K, strict=True)], 1))
    return u[:, : max(1, int((s > _ROUNDING * s[:1]).sum()))]


class Thinned(NamedTuple):
    """B ``[m, r]`` and A ``[r, n]``, how large what they leave of a matrix is, and how large that was, as ‖·‖²."""

    left: Tensor
    right: Tensor
    lost: float
    whole: float


def thinned(U: Tensor, M: Tensor, Vh: Tensor, rank: int) -> Thinned:
    """The best approximation B A of U M Vᵀ, for U and V orthonormal, with the singular values in equal parts in B and A.

    Source: Eckart and Young, 1936.
    """
    with one_torch_thread():
        u, s, vh = torch.linalg.svd(M, full_matrices=False)
        root = s[:rank].sqrt()
        squares = s.square()
        return Thinned(
            U @ (u[:, :rank] * root), (vh[:rank] * root[:, None]) @ Vh, float(squares[rank:].sum()), float(squares.sum())
        )
