"""WUDI in closed form: move the summed task vectors to where they disturb each task least, along the strong directions."""

from __future__ import annotations

import torch

from eutectic.methods._method import Finite, Method, NonNegative, chain
from eutectic.methods._spectral import filtered, on_matrices
from eutectic.methods._transforms import scale_by

REFERENCE = "Cheng et al., Whoever started the interference should end it (WUDI), ICML 2025, arXiv:2503.08099"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def wudi(time: NonNegative = 300.0, scale: Finite = 1.0) -> Method:
    """Descend from the sum of the task vectors on the interference in every matrix, for a time t, in closed form.

        loss(M) = Σ ‖(M − τₖ) τₖᵀ‖² / ‖τₖ‖²,   C = Σ τₖᵀτₖ / ‖τₖ‖² = V diag(l) Vᵀ,   D = Σ τₖτₖᵀτₖ / ‖τₖ‖²,   M₀ = Σ τₖ
        θ = θ₀ + λ (M₀ − M₀ V diag(f) Vᵀ + D V diag(f / l) Vᵀ),   f = 1 − exp(−l t)

    Vectors, embeddings and heads: θ = θ₀ + λ · mean τₖ.

    Args:
        time: t, 0 or more; 0 leaves the sum, and a very long one gives the minimum of the loss, D C⁺.
        scale: λ; the paper has 1.

    Source: the loss of Cheng et al., ICML 2025, arXiv:2503.08099; its gradient flow in closed form, arXiv:2606.07289, 2026.
    Differs from the former, which takes 300 steps of Adam, and from the latter's best setting, which also cuts the
    weakest third of the directions and takes t = 1300.
    """
    return chain(
        on_matrices(lambda x_K, noise: filtered(x_K, lambda curve: -torch.expm1(-curve * time)), workspace=40), scale_by(scale)
    )
