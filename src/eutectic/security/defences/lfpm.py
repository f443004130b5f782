"""LFPM, reconstructed: one more task vector, that a merge with it is deaf to mined prompts all along the way there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.fusion._fit import Batches, generator
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.methods._method import Count, NonNegative, Positive
from eutectic.security.defences._defended import fill_with, merged, outputs, over, tensors_of, tuned
from eutectic.security.miner import MODES
from eutectic.security.triggers import pixels_of
from eutectic.task import Task

REFERENCE = "Zhu et al., Linear feature path minimization against backdoors in model merging, ICML 2026, arXiv:2606.12498"
#: the clean subspace holds this share of the features' energy
CLEAN = 0.95


def lfpm(
    steps: Count = 30,
    lr: Positive = 2e-5,
    points: Count = 2,
    rho: NonNegative = 0.05,
    gamma: NonNegative = 1.0,
    mu: NonNegative = 1.0,
    rank: Count = 2,
    inner_lr: Positive = 0.5,
    batch_size: Count = 8,
    mode: str = "frame",
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Add an anti-backdoor task vector τ to a merge θ_m: on the whole path θ_m + α τ, prompts are to change little.

        min_τ  ∫₀¹ ℓ(θ_m + α τ) dα
        ℓ = KL( p_m(x) ‖ p(x ⊕ z) ) + γ ‖Uᵀ(h(x ⊕ z) − h_m(x))‖² / ‖h_m(x)‖² + μ KL( p_m(x) ‖ p(x) )

    z is a prompt for each task, mined against the same loss; U spans the ``rank`` directions that it moves features h in most,
    outside those that hold 95 % of the clean features' energy.  Needs unlabelled images.

    Args:
        steps: of Adam on τ.
        lr: Adam's.
        points: of the path in a step, α = 1 and others drawn from [0, 1].
        rho: radius of the sharpness-aware step, ε = ρ ∇ / ‖∇‖.
        gamma: γ.
        mu: μ.
        rank: of U.
        inner_lr: by how much a prompt's parameters move in a step.
        batch_size: of each task.
        mode: of the prompts, see ``security.miner.MODES``.
        method: the merge that is defended.
        parameters: of that method.

    Source: Zhu et al., ICML 2026, arXiv:2606.12498, of which only the abstract and a summary could be read: a reconstruction,
    whose formulas are ours.  The authors' code is not public, and their numbers are not claimed for it.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network = over(method, parameters), models.network
        weights = fill_with(network, merged(models.base, models.experts, about))
        start = [weight.detach().clone() for weight in weights]
        before, batches = outputs(network, tasks, run), Batches(run, tasks, batch_size)
        tau = [torch.zeros_like(weight) for weight in weights]
        optimiser, noise = torch.optim.Adam(tau, lr=lr), generator(run.seed, "lfpm")
        clean = {task.name: _features(network, task, run) for task in tasks}
        outside = {name: _outside(h) for name, h in clean.items()}
        z = {}
        for task in tasks:
            side = pixels_of(task).of(run.arrays(task).take(torch.arange(1))[0]).shape[-1]
            z[task.name] = torch.randn(MODES[mode].knots(side), generator=noise)

        def go_to(alpha: float, beyond: Sequence[Tensor] | None = None) -> None:
            with torch.no_grad():
                for at, (weight, theta) in enumerate(zip(weights, start, strict=True)):
                    weight.copy_(theta + alpha * (tau[at] if beyond is None else tau[at] + beyond[at]))

        def gradient(step: int, alphas: Sequence[float], beyond: Sequence[Tensor] | None = None) -> tuple[float, list[Tensor]]:
            """J and ∂J/∂τ = mean α ∂ℓ/∂θ; prompts move the other way."""
            slopes, total = [torch.zeros_like(t) for t in tau], 0.0
            for alpha in alphas:
                go_to(alpha, beyond)
                for task in tasks:
                    knots, index, how = z[task.name].requires_grad_(), batches.index(task, step), pixels_of(task)
                    inputs, teacher, h_m = batches.inputs(task, index), before[task.name][index], clean[task.name][index]
                    h = network(how.inputs(MODES[mode].change(knots[None], how.of(inputs))[0]))
                    moved = (h - h_m) @ outside[task.name]
                    u = torch.linalg.svd(moved.detach(), full_matrices=False).Vh[:rank]
                    path = (moved @ u.T).square().sum(1).mean() / h_m.square().sum(1).mean()
                    value = _divergence(task, h, teacher) + gamma * path
                    value = value + mu * _divergence(task, network(inputs), teacher)
                    value.backward()
                    total += value.item() / len(alphas)
                    slope = knots.grad
                    assert slope is not None
                    z[task.name] = knots.detach() + inner_lr * slope.sign()
                for weight, slope in zip(weights, slopes, strict=True):
                    if weight.grad is not None:
                        slope.add_(weight.grad, alpha=alpha / len(alphas))
                        weight.grad = None
            return total, slopes

        history = []
        for step in range(steps):
            alphas = [1.0, *torch.rand(points - 1, generator=noise).tolist()]
            value, slopes = gradient(step, alphas)
            if rho:
                length = torch.stack([slope.norm() for slope in slopes]).norm().clamp(min=1e-12)
                _, slopes = gradient(step, alphas, [rho * slope / length for slope in slopes])
            for t, slope in zip(tau, slopes, strict=True):
                t.grad = slope
            optimiser.step()
            history.append(value)
            run.progress("path", step + 1, steps)
        go_to(1.0)
        tensors, names = tensors_of(models)
        return Artefact(tensors, about | {"names": names, "history": history})

    return Fusion(fit, tuned)


def _divergence(task: Task, features: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(task.head(features), 1), teacher, log_target=True, reduction="batchmean")


@torch.no_grad()
def _features(network: nn.Module, task: Task, run: Run) -> Tensor:
    """H ``[N, width]`` of all that may be seen."""
    return torch.cat([network(inputs) for inputs, _ in run.arrays(task).batches(64)])


def _outside(features: Tensor) -> Tensor:
    """The projection ``[width, width]`` away from the directions that hold most of the features' energy."""
    centred = features - features.mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    held = int((s.square().cumsum(0) / s.square().sum() < CLEAN).sum()) + 1
    u = vh[: min(held, features.shape[1] // 2)]
    return torch.eye(features.shape[1], dtype=features.dtype) - u.T @ u
