"""What defences share: the merge that is defended, the audit that they go by, and how their results lie over that merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Lerp, Overlay
from eutectic.fusion._coefficients import Shaped
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.fusion._tensors import names_of
from eutectic.merge.view import Merged
from eutectic.security.audit import EVIDENCE, Probe, Probing, audit_models
from eutectic.security.triggers import pixels_of
from eutectic.task import Task


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
    below = {name: f"tensors.{group[0]}" for group in artefact.about["names"] for name in group}
    return Overlay(merged(base, experts, artefact.about), Shaped(artefact.tensors, below, base.specs))


def tensors_of(models: ModelSet) -> tuple[Memory, list[list[str]]]:
    """The network's trainable tensors, as ``tuned`` lays them over a merge, and their names."""
    state, kept, names = models.network.state_dict(keep_vars=True), {}, []
    for group in names_of(models).values():
        if isinstance(state[group[0]], nn.Parameter):
            names.append(group)
            kept[f"tensors.{group[0]}"] = state[group[0]].detach().to(models.base.spec(group[0]).dtype).cpu().clone()
    return Memory(kept), names


def suspicions(
    models: ModelSet,
    tasks: Sequence[Task],
    run: Run,
    merge: Callable[[Mapping[str, Checkpoint]], Checkpoint],
    *,
    mining: int,
    modes: Sequence[str] = ("corners",),
) -> list[Probe]:
    """Tasks whose mined triggers are evidence, by the audit of the merge on the inputs that may be seen; worst first."""
    probing = Probing(run.seed, tuple(modes), mining, split=run.split)
    found = audit_models(models, tasks, merge, "", probing, run.progress)
    return sorted((probe for probe in found.probes if probe.gain[1] > EVIDENCE), key=lambda probe: -probe.gain[0])


def fill_with(network: nn.Module, weights: Checkpoint) -> list[nn.Parameter]:
    """Give the network these weights; its parameters, all to be trained."""
    fill(network, weights)
    network.requires_grad_(True)
    return list(network.parameters())


@torch.no_grad()
def outputs(network: nn.Module, tasks: Sequence[Task], run: Run) -> dict[str, Tensor]:
    """Log p ``[N, C]`` of the network as it is, by task, on all that may be seen."""
    found = {}
    for task in tasks:
        logits = [run.forward(network, task, inputs) for inputs, _ in run.arrays(task).batches(64)]
        found[task.name] = F.log_softmax(torch.cat(logits), dim=1)
    return found


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
def mined_success(network: nn.Module, batches: Batches, probes: Sequence[Probe], run: Run) -> float:
    """The largest share of held-out inputs, of those that are not taken for the target anyway, that a mined trigger takes."""
    worst, tasks = 0.0, {task.name: task for task in batches.tasks}
    for probe in probes:
        task = tasks[probe.task]
        inputs = batches.inputs(task, batches.held_out[task.name])
        others = inputs[run.forward(network, task, inputs).argmax(1) != probe.target]
        if len(others):
            triggered = run.forward(network, task, probe.mined.trigger.on(others, pixels_of(task))).argmax(1)
            worst = max(worst, float((triggered == probe.target).double().mean()))
    return worst
