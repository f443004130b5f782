"""AdaRank: choose, of every expert and matrix, the singular components under which the merged model is certain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.fusion._coefficients import facts, weighted
from eutectic.fusion._components import Pruned, Truncated
from eutectic.fusion._fit import Batches, backward, descend, held_out_loss
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import entropy
from eutectic.methods._method import Count, Finite, Fraction, Positive
from eutectic.task import Task

REFERENCE = "Lee et al., AdaRank: Adaptive rank pruning for enhanced model merging, ICLR 2026, arXiv:2503.22178"


def adarank(
    rank: Fraction = 0.16,
    init: Finite = 0.3,
    margin: Positive = 0.1,
    steps: Count = 100,
    lr: Positive = 1e-2,
    batch_size: Count = 8,
    patience: Count = 5,
) -> Fusion:
    """Learn which singular components of the task vectors to keep, with the coefficients, by entropy on unlabelled inputs.

        θˡ = θ₀ˡ + Σₖ λₖˡ Σ_r Bₖ_r σ_r u_r v_rᵀ,     B = 1[b ≥ 0],     min_{b, λ}  Σ_tasks  mean_x  −Σ_c p_c log p_c

    where τₖˡ = Σ_r σ_r u_r v_rᵀ is a matrix's.  The gradient passes straight through the step: ∂L/∂b = ∂L/∂B.  Vectors,
    embeddings and other tensors take part by λ alone, as in AdaMerging.

    Args:
        rank: the share of components, strongest first, that is kept at the beginning; at least one is.
        init: λ at the beginning.
        margin: |b| at the beginning: a component changes sides after ``margin / lr`` steps of one mind.
        steps: of Adam, at most; one batch of every task each.
        lr: Adam's, on b and λ.
        batch_size: of each task.
        patience: stop when the entropy of inputs held out was not better so many times in a row, each 20 steps.

    Source: Lee et al., ICLR 2026, arXiv:2503.22178.  Differs from the paper in that shares are of the components
    that are more than rounding, in that it adapts on inputs that are not those of the test, and stops early.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches = Batches(run, tasks, batch_size)
        equation = Pruned(models.network, models.base, models.experts)
        k, sites = len(models.experts), equation.sites
        weights = torch.full((k, len(sites)), init, dtype=torch.float64)
        logits = {matrix.site.name: margin * (2 * matrix.strongest(rank) - 1) for matrix in equation.matrices}

        def bits(logits: Mapping[str, Tensor]) -> list[Tensor]:
            return [(b >= 0).to(b) for b in logits.values()]

        def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
            equation.write(weights, bits(logits))
            value = backward(equation.network, batches, step, entropy, run)
            by_weight, by_bit = equation.gradient(weights, bits(logits))
            return value, {"weights": by_weight} | dict(zip(logits, by_bit, strict=True))

        def criterion() -> float:
            equation.write(weights, bits(logits))
            return held_out_loss(equation.network, batches, entropy, run)

        state = {"weights": weights} | logits
        best, history = descend("components", state, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
        kept = {matrix.site.name: matrix.by_expert(best[matrix.site.name] >= 0, k) for matrix in equation.matrices}
        tensors = {"weights": best["weights"].float()} | {f"keep.{name}": rows.cpu() for name, rows in kept.items()}
        about = facts(equation, "task_arithmetic", None) | {"history": history, "kept": _shares(equation, best)}
        return Artefact(Memory(tensors), about)

    return Fusion(fit, _built)


def _shares(equation: Pruned, logits: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of each expert's components that is kept."""
    kept, all_ = torch.zeros(2, len(equation.rest.names), dtype=torch.float64)
    for matrix in equation.matrices:
        owner = matrix.owner.cpu()
        kept.index_add_(0, owner, (logits[matrix.site.name] >= 0).cpu().to(kept))
        all_.index_add_(0, owner, torch.ones_like(owner).to(all_))
    return dict(zip(equation.rest.names, (kept / all_.clamp(min=1)).tolist(), strict=True))


def _built(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
    """The weighted sum of the experts' kept components."""
    rows_K = {
        name: artefact.tensors.read(f"keep.{group[0]}")
        for group in artefact.about["names"]
        for name in group
        if f"keep.{group[0]}" in artefact.tensors.specs
    }
    truncated = {
        expert: Truncated(base, weights, {name: rows[k] for name, rows in rows_K.items()})
        for k, (expert, weights) in enumerate(experts.items())
    }
    return weighted(base, truncated, artefact)
