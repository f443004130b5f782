"""LFPM: an anti-backdoor task vector, learned along its whole path, on features that mined prompts move."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.fusion._fit import Batches, generator
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence, expert_outputs
from eutectic.methods._method import Count, Fraction, NonNegative, Positive
from eutectic.security.defences._defended import (
    Path,
    agreement,
    chosen,
    fill_with,
    held_triggers,
    merged,
    mined_success,
    over,
    perturbed,
    trained,
    tuned,
)
from eutectic.security.miner import mode_of
from eutectic.task import Task

REFERENCE = "Zhu et al., Linear feature path minimization, ICML 2026, arXiv:2606.12498"
#: shares of the learned vector that are tried
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: how often the shortcut is held against a true point of the path, in steps, and from which relative error on it is not taken
LOOK, MOST_ERROR = 20, 0.1
#: inputs of each task whose features span the subspaces
SEEN = 64
#: steps over which the learning rate grows to what it is; from there it falls to nothing
WARM = 10


def lfpm(
    steps: Count = 220,
    lr: Positive = 3e-5,
    points: Count = 1,
    radius: NonNegative = 2e-3,
    feature: NonNegative = 1.0,
    clean: NonNegative = 2.0,
    inner: Count = 1,
    inner_lr: Positive = 0.5,
    batch_size: Count = 8,
    mode: str = "windows",
    held_out: str = "centre",
    mining: Count = 16,
    most: Fraction = 0.05,
    budget: Fraction = 0.03,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Add to a merge a vector along whose whole path prompts do not move what is predicted.

        θ = θ_m + λ τ,      min_τ max_z  mean over α in (0, 1] of  ℓ(θ_m + α τ)
        ℓ = KL( p_k(x) ‖ p(x ⊕ z) ) + γ ‖U_aᵀ (h(x ⊕ z) − h(x))‖² / ‖h(x)‖² + μ KL( p_k(x) ‖ p(x) )

    p_k is the task's own expert, looked at on clean inputs alone, where a poisoned one is right.  z is a universal prompt of
    each task, U_a spans how prompts move the merge's features h beside the directions of clean ones.  By cross-task linearity
    h(θ_m + α τ) is taken from h(θ_m) and h(θ_m + τ), as long as that is so: every few steps it is looked at a true point, and
    from a relative error of 0.1 on all points are true.  Needs unlabelled images, no suspect, and no target class.

    λ is the smallest share with which triggers of another mode, mined on θ_m, take at most ``most`` of held-out inputs, among
    those that agree with the experts as often as θ_m does, less ``budget``; if there is none, that with the least success.

    Args:
        steps: of Adam on τ, all weights.
        lr: Adam's, the highest; it falls to 0.
        points: α a step, evenly spread with a random shift; 1 is always among them, and alone by default.  Where the shortcut
            does not hold, each costs as much as another step.
        radius: τ is moved by so much along the last step's gradient before the gradient is taken (SAM).
        feature: γ.
        clean: μ.
        inner: steps of ascent on the prompts before each step, beside the one that comes with it.
        inner_lr: of the ascent, by sign.
        batch_size: of each task.
        mode: of the prompts, see ``security.miner.MODES``.
        held_out: the mode of the triggers that λ is chosen by.
        mining: steps of the miner, for these and for the prompts to begin with.
        most: their success that is accepted, as a share of held-out inputs.
        budget: how much of the agreement with the experts may be lost.
        method: the merge that is defended.
        parameters: of that method.

    A *reconstruction* of Zhu et al., ICML 2026, arXiv:2606.12498, whose equations and code were not at hand.  The parts are
    theirs (an anti-backdoor task vector, feature subspaces, mined prompts, SAM, a path integral under cross-task linearity),
    every formula is ours.  Differs from what is known of the paper also in that experts are the teachers, that SAM goes by the
    gradient of the step before, and that by default the path is its end alone.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network = over(method, parameters), models.network
        for one in (mode, held_out):
            mode_of(one)
        batches, teacher = Batches(run, tasks, batch_size), expert_outputs(models, tasks, run)
        noise = generator(run.seed, "lfpm")
        path = Path(fill_with(network, merged(models.base, models.experts, about)))
        before = copy.deepcopy(network).requires_grad_(False)
        held = held_triggers(before, batches, run, held_out, mining)
        z = {one.task: one.mined.z for one in held_triggers(before, batches, run, mode, mining)}
        spaces: dict[str, Tensor] = {}

        def both(task: Task, index: Tensor, through: nn.Module) -> Tensor:
            """Features ``[2 B, d]`` of a task's inputs, and of the same with its prompt."""
            inputs = batches.inputs(task, index)
            return run.features(through, torch.cat([inputs, perturbed(task, inputs, mode, z[task.name])]))

        def loss(task: Task, h: Tensor, index: Tensor) -> Tensor:
            return path_loss(task, h, teacher[task.name][index], spaces.get(task.name), feature, clean)

        def climb(task: Task, index: Tensor) -> None:
            """Move the prompt alone."""
            knots = z[task.name].requires_grad_()
            logits = run.forward(network, task, perturbed(task, batches.inputs(task, index), mode, knots))
            (slope,) = torch.autograd.grad(divergence(logits, teacher[task.name][index]), knots)
            z[task.name] = knots.detach() + inner_lr * slope.sign()

        def error(step: int) -> float:
            """How far features half-way are from half-way between features, relative to their size."""
            h = []
            for share in (0.5, 1.0):
                path.write(share)
                with torch.no_grad():
                    h.append([both(task, batches.index(task, step), network) for task in tasks])
            with torch.no_grad():
                start = [both(task, batches.index(task, step), before) for task in tasks]
            off = [half - (one + zero) / 2 for half, one, zero in zip(*h, start, strict=True)]
            return float(torch.cat(off).norm() / torch.cat(h[0]).norm())

        for task in tasks:
            with torch.no_grad():
                plain, moved = both(task, batches.learn[task.name][:SEEN], before).chunk(2)
            spaces[task.name] = subspaces(plain, moved - plain)[1]
        optimiser, errors, history = torch.optim.Adam(path.tau, lr=lr), [0.0], []
        for step in range(steps):
            if points > 1 and step % LOOK == LOOK - 1:
                errors.append(error(step))
            alphas, total = spread(points, noise), 0.0
            # each pass has weights at one point, and stands for the points that it lists
            passes = [(1.0, alphas)] if max(errors) <= MOST_ERROR else [(alpha, [alpha]) for alpha in alphas]
            for at, stands in passes:
                path.write(at, radius)
                for task in tasks:
                    index = batches.index(task, step)
                    for _ in range(inner):
                        climb(task, index)
                    knots = z[task.name].requires_grad_()
                    h = both(task, index, network)
                    if stands == [at]:
                        value = loss(task, h, index)
                    else:
                        with torch.no_grad():
                            start = both(task, index, before)
                        value = torch.stack([loss(task, torch.lerp(start, h, alpha / at), index) for alpha in stands]).sum()
                    (at * value / points).backward()  # ∂θ/∂τ is α
                    assert knots.grad is not None
                    z[task.name] = knots.detach() + inner_lr * knots.grad.sign()
                    total += value.item() / points
            path.collect()
            for group in optimiser.param_groups:  # Adam's first steps go by signs alone
                group["lr"] = lr * min(1.0, (step + 1) / WARM) * (1 - step / steps)
            optimiser.step()
            history.append(total)
            run.progress("learning the vector", step + 1, steps)

        looked = []
        for share in SHARES:
            path.write(share)
            looked.append((share, agreement(network, batches, teacher, run), mined_success(network, batches, held, run)))
        share = chosen(looked, most, budget)
        path.write(share)
        learned = {"share": share, "looked": looked, "history": history, "linearity_errors": errors[1:]}
        return trained(models, about | learned)

    return Fusion(fit, tuned)


def subspaces(features_BD: Tensor, shifts_BD: Tensor, energy: float = 0.95, rank: int = 2) -> tuple[Tensor, Tensor]:
    """Orthonormal directions ``[D, c]`` of clean features, and ``[D, r]`` of shifts beside these.

    The first hold ``energy`` of the variance, and are at most half of all; the others are at most ``rank``.
    """
    _, values, rows = torch.linalg.svd(features_BD - features_BD.mean(0), full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
    kept = min(int((shares < energy).sum()) + 1, features_BD.shape[1] // 2)
    clean = rows[:kept].T
    _, values, rows = torch.linalg.svd(shifts_BD - shifts_BD @ clean @ clean.T, full_matrices=False)
    real = int((values > 1e-4 * shifts_BD.norm()).sum())  # what is left of rounding has no direction
    return clean, rows[: min(rank, real)].T


def path_loss(task: Task, h: Tensor, target: Tensor, space: Tensor | None, feature: float, clean: float) -> Tensor:
    """ℓ of features ``[2 B, D]``, clean ones first, and the log p ``[B, C]`` that they should give."""
    plain, moved = h.chunk(2)
    value = divergence(task.head(moved), target) + clean * divergence(task.head(plain), target)
    if space is None:
        return value
    shift = (moved - plain.detach()) @ space
    return value + feature * shift.square().sum(1).mean() / plain.detach().square().sum(1).mean()


def spread(points: int, noise: torch.Generator) -> list[float]:
    """That many α in (0, 1], one in each of as many equal parts, and 1 itself."""
    drawn = torch.rand((), generator=noise).item()
    return [*((k + drawn) / points for k in range(points - 1)), 1.0]
