"""Iso-CTS: one and the same strength in the directions that the tasks share and in those that are each task's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eutectic.methods._method import Finite, Fraction, Method, chain
from eutectic.methods._spectral import Svd, on_matrices, polar, svd
from eutectic.methods._transforms import scale_by, total

REFERENCE = "Marczak et al., No task left behind: isotropic model merging, ICML 2025, arXiv:2502.04959"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def iso_cts(common: Fraction = 0.8, scale: Finite = 1.0) -> Method:
    """Replace the weakest directions of the summed task vectors by each task's strongest outside of the rest; flatten.

        Σₖ τₖ ≈ U₀ diag(σ₀) V₀ᵀ of rank r − K s,   (1 − U₀ U₀ᵀ) τₖ ≈ Uₖ diag(σₖ) Vₖᵀ of rank s = round((r − ⌊c r⌋) / K)
        θ = θ₀ + λ · mean(σ₀, σ₁ … σ_K) · polar([U₀ U₁ … U_K]) polar([V₀ V₁ … V_K])ᵀ

    with r the rank of the sum.  Vectors, embeddings and heads: θ = θ₀ + λ · mean τₖ.

    Args:
        common: c, the share of the directions that are common, 0 to 1; the paper takes 0.8, and 1 is ``iso_c``.
        scale: λ; the paper tunes it, 1.0 to 1.5.

    Source: Marczak et al., ICML 2025, arXiv:2502.04959, Algorithm 2 (Iso-CTS).  Differs from the paper for task vectors of low
    rank (LoRA experts), where it takes the smaller side of the matrix for r, and directions without strength with it:
    here they, and residuals that are rounding, stay out, and all strengths stay equal.
    """

    def flatten(x_K: Tensor, noise: float) -> Tensor:
        wide_K = x_K.double()
        whole, k = svd(total(wide_K), noise * math.sqrt(len(x_K))), len(x_K)
        rank = len(whole.s)
        own = min(round((rank - int(rank * common)) / k), rank // k)
        parts = [_strongest(whole, rank - own * k)]
        U = parts[0].U
        parts += [_strongest(svd(x - U @ (U.T @ x), max(noise, 1e-6 * float(x.norm()))), own) for x in wide_K]
        s = torch.cat([part.s for part in parts])
        frame = polar(torch.cat([part.U for part in parts], dim=1)) @ polar(torch.cat([part.Vh for part in parts]))
        return (s.sum() / max(1, len(s)) * frame).to(x_K.dtype)

    return chain(on_matrices(flatten), scale_by(scale))


def _strongest(found: Svd, count: int) -> Svd:
    return Svd(found.U[:, :count], found.s[:count], found.Vh[:count])
