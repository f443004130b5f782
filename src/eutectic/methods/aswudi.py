"""ASWUDI: WUDI in closed form, solved exactly along as many directions as the task vectors take part in; nothing to choose."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eutectic.methods._method import Finite, Method, chain
from eutectic.methods._spectral import filtered, on_matrices
from eutectic.methods._transforms import scale_by

REFERENCE = "Closed-form WUDI (SWUDI, ASWUDI), 2026, arXiv:2606.07289; the loss: Cheng et al., ICML 2025, arXiv:2503.08099"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def aswudi(scale: Finite = 1.0) -> Method:
    """Minimise the interference of the merged matrix along its strongest directions, and leave the sum in the others.

        C = Σ τₖᵀτₖ / ‖τₖ‖² = V diag(l) Vᵀ with l falling,   D = Σ τₖτₖᵀτₖ / ‖τₖ‖²,   M₀ = Σ τₖ
        θ = θ₀ + λ (M₀ − M₀ V diag(f) Vᵀ + D V diag(f / l) Vᵀ),   f = 1 for the first ⌈(Σ √l)² / Σ l⌉ directions, else 0

    Vectors, embeddings and heads: θ = θ₀ + λ · mean τₖ.

    Args:
        scale: λ; the paper has 1.

    Source: arXiv:2606.07289, 2026 (ASWUDI, with the participation of √l), for the loss of Cheng et al., ICML 2025,
    arXiv:2503.08099.  Differs from the authors' code in that directions without strength are not counted.
    """

    def keep(curve: Tensor) -> Tensor:
        share = float(curve.sqrt().sum().square() / curve.sum()) if len(curve) else 0.0
        return (torch.arange(len(curve)) < math.ceil(share - 1e-9)).to(curve.dtype)

    return chain(on_matrices(lambda x_K, noise: filtered(x_K, keep), workspace=40), scale_by(scale))
