"""SVC: calibrate the singular values of what another method merged, where shared directions piled up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eutectic.methods._method import Method, Positive, Scope, Site, Stats, build_inner, chain
from eutectic.methods._spectral import WORKSPACE, is_map, matrix_scope, svd
from eutectic.methods._threads import one_torch_thread

REFERENCE = "Li et al., When shared knowledge hurts: spectral over-accumulation (SVC), ICML 2026, arXiv:2602.05536"


def svc(method: str = "task_arithmetic", parameters: dict[str, Any] | None = None, alpha: Positive | None = None) -> Method:
    """Rescale each singular direction of a merged matrix by how much of every task it holds on average.

        τ = method(τ₁ … τ_K) = U diag(σ) Vᵀ,   sᵣₖ = ⟨uᵣᵀτ, uᵣᵀτₖ⟩ / ‖uᵣᵀτₖ‖²,   γᵣ = K / Σₖ max(α, sᵣₖ)
        θ = θ₀ + U diag(γ ⊙ σ) Vᵀ

    with s = 0 for a task that has nothing in the direction.  Vectors, embeddings and heads stay as the method merged them.

    Args:
        method: name of the wrapped method; one on task vectors.
        parameters: the wrapped method's own; its defaults if left out.
        alpha: α, above 0: the least that a task counts for.  1 / K if left out; 1 shrinks only; larger ones shrink more.

    Raises:
        UnknownNameError: there is no such method.
        ParameterError: the wrapped method's parameters, or it works on weights.

    Source: Li et al., ICML 2026, arXiv:2602.05536, Algorithm 1.  Differs from FusionBench's code, which projects each task
    onto its own singular vectors and not the merged ones, and in the tasks with s = 0, which there are 0 / 0.  No longer
    linear in the wrapped method's ``scale``, most of which it takes back.
    """
    inner = build_inner("svc", method, parameters)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        merged = inner.apply(x_K, site, stats)
        if not is_map(site):
            return merged
        with one_torch_thread():
            return _calibrated(merged, x_K, 1 / len(x_K) if alpha is None else alpha)

    whole = Method(apply, Scope.TENSOR, sited=True, scope_of=matrix_scope, workspace=WORKSPACE)
    return chain(inner, whole)._replace(apply=apply, measures=inner.measures)


def _calibrated(merged: Tensor, x_K: Tensor, alpha: float) -> Tensor:
    found = svd(merged.double())
    held = torch.zeros_like(found.s)
    for x in x_K.double():
        along = found.U.T @ x
        mass = along.square().sum(1)
        there = mass > (1e-6 * x.norm()).square()  # below, it is float32's rounding
        shared = (found.s[:, None] * found.Vh * along).sum(1) / torch.where(there, mass, 1)
        held += torch.where(there, shared, 0).clamp(min=alpha)
    return (found.U * (found.s * len(x_K) / held) @ found.Vh).to(merged.dtype)
