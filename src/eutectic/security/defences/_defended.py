"""What defences share: the merge that is defended, the audit that they go by, and how their results lie over that merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.views import Lerp
from eutectic.fusion._fit import Batches, Loss, backward, generator
from eutectic.fusion._fusion import Artefact, ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.fusion._tensors import finished, laid_over, names_of
from eutectic.merge.view import Merged
from eutectic.security.audit import Found, Probing, audit_models
from eutectic.security.miner import Mined, mine, mode_of
from eutectic.security.triggers import made_of, pixels_of
from eutectic.task import Task

Choice = TypeVar("Choice")


def over(method: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fact that ``merged`` reads of an artefact."""
    return {"over": {"method": method, "parameters": dict(parameters or {})}}


def merged(base: Checkpoint, experts: Mapping[str, Checkpoint], about: Mapping[str, Any]) -> Merged:
    """The merge that is defended."""
    return Merged(about["over"]["method"], base, experts, about["over"]["parameters"])


def gated(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
    """The merge of θ₀ + gₖ τₖ, for the artefact's ``gates`` ``[K]``."""
    gates = artefact.tensors.read("gates").tolist()
    some = {
        name: weights if gate == 1 else Lerp(base, weights, gate)
        for (name, weights), gate in zip(experts.items(), gates, strict=True)
    }
    return merged(base, some, artefact.about)


def tuned(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
    """The artefact's ``tensors``, and the merge for all others."""
    return laid_over(merged(base, experts, artefact.about), base, artefact)


def trained(models: ModelSet, facts: Mapping[str, Any]) -> Artefact:
    """The network's parameters as they are, for ``tuned`` to lay over a merge, and facts."""
    state, names = models.network.state_dict(keep_vars=True), names_of(models)
    firsts = [group[0] for group in names.values() if isinstance(state[group[0]], nn.Parameter)]
    found = finished({name: state[name].detach().clone() for name in firsts}, names, models.base)
    return found._replace(about={**found.about, **facts})


def suspicions(
    models: ModelSet,
    tasks: Sequence[Task],
    run: Run,
    merge: Callable[[Mapping[str, Checkpoint]], Checkpoint],
    *,
    mining: int,
    modes: Sequence[str] = ("corners",),
) -> list[tuple[str, Found]]:
    """Suspects, and the mined triggers that are evidence, by the audit of the merge on what may be seen."""
    probing = Probing(run.seed, tuple(modes), mining, split=run.split)
    return audit_models(models, tasks, merge, "", probing, run.progress).findings


class Held(NamedTuple):
    """A trigger that a defence is judged by."""

    task: str
    mined: Mined

    @property
    def target(self) -> int:
        """The class that it takes inputs to."""
        return self.mined.target


def held_triggers(network: nn.Module, batches: Batches, run: Run, mode: str, steps: int) -> list[Held]:
    """Each task's best trigger of a mode against a network, for any class; mined on inputs that are not held out.

    Raises TaskError for a task that has no images, UnknownNameError for a mode that there is not.
    """
    found = []
    for number, task in enumerate(batches.tasks):
        run.progress("mining", number, len(batches.tasks))
        with torch.no_grad():
            classes = run.forward(network, task, batches.inputs(task, batches.learn[task.name][:1])).shape[1]
        found.append(held_trigger(network, batches, run, task, [(mode, c) for c in range(classes)], steps))
    return found


def held_trigger(
    network: nn.Module,
    batches: Batches,
    run: Run,
    task: Task,
    candidates: Sequence[tuple[str, int]],
    steps: int,
    most: int = 72,
) -> Held:
    """A task's best trigger against a network among (mode, class) candidates.  Raises as ``held_triggers`` does."""
    how, inputs = pixels_of(task), batches.inputs(task, batches.learn[task.name][:most])
    found = mine(lambda x: run.forward(network, task, x), how.of(inputs), how, candidates, steps=steps, seed=run.seed)
    return Held(task.name, found[0])


def fill_with(network: nn.Module, weights: Checkpoint) -> list[nn.Parameter]:
    """Give the network these weights; its parameters, all to be trained."""
    fill(network, weights)
    network.requires_grad_(True)
    return list(network.parameters())


class Path:
    """θ_m + α τ in a network's parameters, which are the place where both are worked on."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        """τ = 0; ``weights`` have θ_m."""
        self.weights, self.start = weights, [w.detach().clone() for w in weights]
        self.tau = [torch.zeros_like(w) for w in self.start]
        self._slope: list[Tensor] = []

    @torch.no_grad()
    def write(self, alpha: float, radius: float = 0.0) -> None:
        """Set the parameters to θ_m + α (τ + ε), ε of length ``radius`` along the last gradient that was collected."""
        norm = float(torch.stack([g.norm() for g in self._slope]).norm()) if self._slope and radius else 0.0
        for at, (weight, start, tau) in enumerate(zip(self.weights, self.start, self.tau, strict=True)):
            weight.copy_(start).add_(tau, alpha=alpha)
            if norm:
                weight.add_(self._slope[at], alpha=alpha * radius / norm)

    def collect(self) -> None:
        """Hand the parameters' gradients to τ."""
        self._slope = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        for weight, tau, slope in zip(self.weights, self.tau, self._slope, strict=True):
            tau.grad, weight.grad = slope, None


def taught(
    path: Path, network: nn.Module, batches: Batches, loss: Loss, run: Run, *, steps: int, lr: float, radius: float = 0.0
) -> list[float]:
    """Adam on τ along a path to its end, at the worst of all weights within ``radius`` (SAM); the losses of all steps."""
    optimiser, history = torch.optim.Adam(path.tau, lr=lr), []
    for step in range(steps):
        for reach in (0.0, radius) if radius else (0.0,):
            path.write(1.0, reach)
            value = backward(network, batches, step, loss, run)
            path.collect()
        optimiser.step()
        history.append(value)
        run.progress("tuning", step + 1, steps)
    path.write(1.0)
    return history


def perturbations(tasks: Sequence[Task], run: Run, mode: str, noise: torch.Generator) -> dict[str, Tensor]:
    """Random parameters z of a universal trigger of a mode for each task.

    Raises TaskError for a task that has no images, UnknownNameError for a mode that there is not.
    """
    sides = {task.name: pixels_of(task).of(run.arrays(task).take(torch.arange(1))[0]).shape[-1] for task in tasks}
    return {name: torch.randn(mode_of(mode).knots(side), generator=noise) for name, side in sides.items()}


def perturbed(task: Task, inputs: Tensor, mode: str, z: Tensor) -> Tensor:
    """A task's inputs with the trigger of parameters z, through which gradients go."""
    how = pixels_of(task)
    return how.inputs(mode_of(mode).change(z[None], how.of(inputs))[0])


class Climbing:
    """A universal trigger of each task, that climbs a loss in the same passes in which a network descends it."""

    def __init__(
        self,
        network: nn.Module,
        batches: Batches,
        run: Run,
        mode: str,
        loss: Loss,
        lr: float,
        weight: float,
        climbed: Loss | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Triggers of a mode, which move by ``lr`` and the sign of the gradient of ``climbed``, by default ``loss``.

        ``weight`` is that of the loss in what the network descends.  ``start`` has each task's z, random by default.  Raises as
        ``perturbations`` does.
        """
        self.network, self.batches, self.run, self.mode = network, batches, run, mode
        self.lr, self.weight, self._loss, self._climbed = lr, weight, loss, climbed
        self.z = perturbations(batches.tasks, run, mode, generator(run.seed, "dam")) if start is None else dict(start)

    def logits(self, task: Task, index: Tensor, z: Tensor) -> Tensor:
        """Of a task's samples under the trigger of parameters z."""
        return self.run.forward(self.network, task, perturbed(task, self.batches.inputs(task, index), self.mode, z))

    def backward(self, step: int) -> None:
        """Add the gradient of the loss to the network's, and move the triggers the other way."""
        for task in self.batches.tasks:
            index, z = self.batches.index(task, step), self.z[task.name].requires_grad_()
            logits = self.logits(task, index, z)
            slope = None
            if self._climbed is not None:
                (slope,) = torch.autograd.grad(self._climbed(task, logits, index), z, retain_graph=True)
            (self.weight * self._loss(task, logits, index)).backward()
            slope = z.grad if slope is None else slope
            assert slope is not None
            self.z[task.name] = z.detach() + self.lr * slope.sign()

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss over the samples that are held out."""
        held = self.batches.held_out
        parts = [self._loss(t, self.logits(t, held[t.name], self.z[t.name]), held[t.name]) for t in self.batches.tasks]
        return self.weight * float(torch.stack(parts).sum())


def chosen(looked: Sequence[tuple[Choice, float, float]], most: float, budget: float) -> Choice:
    """Of lines (choice, agreement, success), the first of which is to do nothing: the first whose success is at most ``most``.

    Only lines count whose agreement is at least the first's, less ``budget``; if none of them will do, that of least success.
    """
    within = [line for line in looked if line[1] >= looked[0][1] - budget]
    good = [line for line in within if line[2] <= most]
    return good[0][0] if good else min(within, key=lambda line: line[2])[0]


@torch.no_grad()
def agreement(network: nn.Module, batches: Batches, before: Mapping[str, Tensor], run: Run) -> float:
    """The share of held-out inputs that the network takes for the class it took them for before, in the mean over tasks."""
    shares = []
    for task in batches.tasks:
        index = batches.held_out[task.name]
        now = run.forward(network, task, batches.inputs(task, index)).argmax(1)
        shares.append(float((now == before[task.name][index].argmax(1)).double().mean()))
    return sum(shares) / len(shares)


@torch.no_grad()
def mined_success(network: nn.Module, batches: Batches, probes: Sequence[Found | Held], run: Run) -> float:
    """The largest share of held-out inputs, of those that are not taken for the target anyway, that a mined trigger takes."""
    worst, tasks = 0.0, {task.name: task for task in batches.tasks}
    for probe in probes:
        task = tasks[probe.task]
        inputs = batches.inputs(task, batches.held_out[task.name])
        others = inputs[run.forward(network, task, inputs).argmax(1) != probe.target]
        if len(others):
            triggered = run.forward(network, task, probe.mined.trigger.on(others, made_of(task, others))).argmax(1)
            worst = max(worst, float((triggered == probe.target).double().mean()))
    return worst
