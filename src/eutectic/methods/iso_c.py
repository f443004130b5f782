"""Iso-C: give the summed task matrix one and the same strength in all its directions."""

from __future__ import annotations

import math

from torch import Tensor

from eutectic.methods._method import Finite, Method, chain
from eutectic.methods._spectral import on_matrices, svd
from eutectic.methods._transforms import scale_by, total

REFERENCE = "Marczak et al., No task left behind: isotropic model merging, ICML 2025, arXiv:2502.04959"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def iso_c(scale: Finite = 1.0) -> Method:
    """Flatten the spectrum of the summed task vectors of every matrix.

        Σₖ τₖ = U diag(σ) Vᵀ,   θ = θ₀ + λ · mean(σ) · U Vᵀ        vectors, embeddings and heads: θ = θ₀ + λ · mean τₖ

    Args:
        scale: λ; the paper tunes it, 1.0 to 1.5.

    Source: Marczak et al., ICML 2025, arXiv:2502.04959, section 4 (Iso-C).  Differs from the paper for sums of low rank
    (LoRA experts): directions without strength stay out, and the mean is over those that have some.
    """

    def flatten(x_K: Tensor, noise: float) -> Tensor:
        found = svd(total(x_K), noise * math.sqrt(len(x_K)))
        return found.s.sum() / max(1, len(found.s)) * (found.U @ found.Vh)

    return chain(on_matrices(flatten), scale_by(scale))
