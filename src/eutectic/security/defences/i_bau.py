"""I-BAU, without its hypergradient: universal triggers are mined and unlearned in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eutectic.fusion._fit import Batches, generator
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence, outputs
from eutectic.methods._method import Count, NonNegative, Positive
from eutectic.security.defences._defended import fill_with, merged, over, perturbations, perturbed, trained, tuned
from eutectic.task import Task

REFERENCE = "Zeng et al., Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022, arXiv:2110.03735"


def i_bau(
    rounds: Count = 5,
    inner: Count = 5,
    steps: Count = 5,
    lr: Positive = 2e-5,
    inner_lr: Positive = 0.5,
    clean: NonNegative = 1.0,
    batch_size: Count = 8,
    mode: str = "windows",
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Make a merge predict under universal triggers what it predicts without.

        each round:  z ← ascent on  KL( p_m(x) ‖ p(T_z(x)) ),   then
                     min_θ  Σ_tasks  KL( p_m(x) ‖ p(T_z(x)) ) + γ KL( p_m(x) ‖ p(x) )

    p_m are the merge's own predictions, so no labels are needed.  Each task has a trigger of its own, which is carried over
    from round to round, and looks for no class: it needs no audit, and defends as much against θ₀'s own weaknesses.

    Args:
        rounds: of ascent and descent.
        inner: steps of ascent on the triggers a round.
        steps: of Adam on all weights a round.
        lr: Adam's.
        inner_lr: of the ascent, by sign, on the triggers' parameters.
        clean: γ.
        batch_size: of each task.
        mode: of the triggers, see ``security.miner.MODES``.
        method: the merge that is defended.
        parameters: of that method.

    Source: Zeng et al., ICLR 2022, arXiv:2110.03735.  Differs from the paper in that the implicit hypergradient is left out,
    the trigger is painted in windows instead of bounded in norm, and the labels are the merge's predictions.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network = over(method, parameters), models.network
        weights = fill_with(network, merged(models.base, models.experts, about))
        before = {task.name: outputs(network, task, run) for task in tasks}
        batches, optimiser = Batches(run, tasks, batch_size), torch.optim.Adam(weights, lr=lr)
        z = perturbations(tasks, run, mode, generator(run.seed, "i_bau"))

        def moved(task: Task, step: int, triggered: bool) -> torch.Tensor:
            index = batches.index(task, step)
            inputs = batches.inputs(task, index)
            if triggered:
                inputs = perturbed(task, inputs, mode, z[task.name])
            logits = run.forward(network, task, inputs)
            return divergence(logits, before[task.name][index])

        history = []
        for turn in range(rounds):
            for parameter in weights:
                parameter.requires_grad_(False)
            for number in range(inner):
                for task in tasks:
                    z[task.name].requires_grad_()
                    (slope,) = torch.autograd.grad(moved(task, turn * inner + number, True), z[task.name])
                    z[task.name] = z[task.name].detach() + inner_lr * slope.sign()
            for parameter in weights:
                parameter.requires_grad_(True)
            total = 0.0
            for number in range(steps):
                for task in tasks:
                    at = turn * steps + number
                    loss = moved(task, at, True) + clean * moved(task, at, False)
                    loss.backward()
                    total += loss.item() / steps
                optimiser.step()
                optimiser.zero_grad()
            history.append(total)
            run.progress("unlearning", turn + 1, rounds)
        return trained(models, about | {"history": history})

    return Fusion(fit, tuned)
