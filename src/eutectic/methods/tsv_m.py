"""TSV-M: keep each task's strongest singular directions and make them orthogonal to the others'."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._method import Finite, Method, chain
from eutectic.methods._spectral import on_matrices, polar, svd
from eutectic.methods._transforms import scale_by

REFERENCE = "Gargiulo et al., Task singular vectors, CVPR 2025, arXiv:2412.00081"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def tsv_m(scale: Finite = 1.0) -> Method:
    """Merge the top singular directions of the task vectors of every matrix after whitening them.

        τₖ ≈ Uₖ diag(σₖ) Vₖᵀ of rank ⌊r / K⌋,   θ = θ₀ + λ · polar([U₁ … U_K]) diag([σ₁ … σ_K]) polar([V₁ … V_K])ᵀ

    with r the smaller side.  Vectors, embeddings and heads: θ = θ₀ + λ · mean τₖ.

    Args:
        scale: λ; the paper uses 1.

    Source: Gargiulo et al., CVPR 2025, arXiv:2412.00081, Algorithm 1.  Differs from the paper for task vectors of low rank:
    directions without strength are not counted among the ⌊r / K⌋, so that they do not disturb the whitening.
    """

    def whiten(x_K: Tensor, noise: float) -> Tensor:
        kept = max(1, min(x_K.shape[1:]) // len(x_K))
        parts = [svd(x, noise, kept) for x in x_K]
        U = torch.cat([part.U for part in parts], dim=1)
        s = torch.cat([part.s for part in parts])
        Vh = torch.cat([part.Vh for part in parts])
        return polar(U) * s @ polar(Vh)

    return chain(on_matrices(whiten), scale_by(scale))
