"""Fitting, keeping and applying: what the command line, the benchmark and Python call."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eutectic import record, registry
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.checkpoint.save import Progress, save_tensors, silent
from eutectic.checkpoint.spec import require_same_layout
from eutectic.checkpoint.views import Select
from eutectic.errors import CheckpointError, LayoutError, ParameterError, TaskError
from eutectic.fusion._fit import processes
from eutectic.fusion._folder import mixture_config
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Protocol, Run
from eutectic.fusion._losses import fill
from eutectic.fusion._routing import routed
from eutectic.merge.api import Source, open
from eutectic.merge.compose import Composed, Outcome
from eutectic.merge.defend import defended
from eutectic.merge.upcycle import Mixture
from eutectic.methods._method import validated
from eutectic.task import Task

_ABOUT = "artefact.json"


def method(name: str, parameters: Mapping[str, Any]) -> Fusion:
    """The registered method with its parameters checked.  Raises UnknownNameError, ParameterError."""
    return registry.get("fusion", name)(**validated(name, parameters))


def fit(name: str, models: ModelSet, tasks: Sequence[Task], parameters: Mapping[str, Any], run: Run) -> Artefact:
    """Fit a method; the artefact says how, and for which models.

    With ``run.folder`` the state is kept in a folder of its own there, which the same call takes up again.
    Raises LayoutError for experts that do not fit the base, TaskError, ParameterError, NonFiniteError; StoppedError, which has
    the last good artefact, for a loss that is not finite after some good steps.
    """
    fusion = method(name, parameters)
    _require_fitting(name, models, tasks, fusion.least_tasks)
    hashes = {"base": fingerprint(models.base)} | {f"experts.{n}": fingerprint(c) for n, c in models.experts.items()}
    about = {
        "method": name,
        "parameters": validated(name, parameters),
        "seed": run.seed,
        "protocol": run.protocol,
        "autocast": run.autocast,
        "tasks": [task.name for task in tasks],
        "seen": {task.name: _identity(task, run, fusion.labelled) for task in tasks if fusion.least_tasks},
        "models": hashes,
        "versions": record.versions(record.ENGINE),
    }
    if run.folder is not None:
        # experts in their order: that is the order of what is fitted
        bound = {key: value for key, value in about["parameters"].items() if key not in fusion.free}
        said = [about | {"parameters": bound}, list(hashes), run.device, str(run.held)]
        run = run.within(run.folder / hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16])
    heads = [task.head for task in tasks if isinstance(task.head, nn.Module)]
    with processes(run.device), _lent(models.network), _frozen(heads, run.device), torch.enable_grad():
        found = fusion.fit(models, tasks, run)
    artefact = Artefact(found.tensors, about | dict(found.about))
    if run.stopped:
        error = run.stopped.pop()
        error.artefact = artefact
        raise error
    return artefact


def _require_fitting(name: str, models: ModelSet, tasks: Sequence[Task], least_tasks: int) -> None:
    """Refuse at once what would be refused after minutes, or never."""
    if len(tasks) < least_tasks:
        raise TaskError(f"{name}: there are no tasks to adapt to")
    names = [task.name for task in tasks]
    twice = next((task for task in names if names.count(task) > 1), None)
    if twice is not None:
        raise TaskError(f"{name}: two tasks are called {twice!r}")
    if not models.experts:
        raise LayoutError(f"{name}: no experts were given; name at least 1")
    if "base" in models.experts:
        raise LayoutError("an expert cannot be called 'base'")
    for expert, weights in models.experts.items():
        require_same_layout(models.base.specs, weights.specs, "the base", f"expert {expert!r} ({weights.origin})")


def _identity(task: Task, run: Run, labelled: str | None) -> str:
    """A hash of the inputs, and labels, that a task shows, and of its head if that is a module."""
    arrays = run.arrays(task) if labelled is None else task.arrays(labelled)
    tensors = {"inputs": arrays.inputs.cpu()} | ({} if labelled is None else {"labels": arrays.labels.cpu()})
    if isinstance(task.head, nn.Module):
        tensors |= {f"head.{name}": tensor.cpu() for name, tensor in task.head.state_dict().items()}
    return fingerprint(Memory(tensors))


@contextlib.contextmanager
def _frozen(heads: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Heads on a device, in evaluation mode and without gradients; afterwards they are as they were."""
    with contextlib.ExitStack() as stack:
        for head in heads:
            first = next(itertools.chain(head.parameters(), head.buffers()), torch.empty(0))
            stack.callback(head.train, head.training)
            stack.callback(head.to, first.device)
            stack.enter_context(_lent(head))
            head.eval().requires_grad_(False).to(device)
        yield


@contextlib.contextmanager
def _lent(network: nn.Module) -> Iterator[None]:
    """Which parameters are trained may be changed inside; gradients that are left are dropped."""
    network.eval()
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag).grad = None


def with_parameters(artefact: Artefact, parameters: Mapping[str, Any]) -> Artefact:
    """The artefact, to be applied with these of the parameters that its fit did not depend on.

    Raises ParameterError for another value of a parameter that it did depend on, and for values that the method refuses.
    """
    name, fitted = artefact.about["method"], artefact.about["parameters"]
    given = validated(name, {**fitted, **parameters})
    for key in parameters:
        if given[key] != fitted[key] and key not in method(name, given).free:
            raise ParameterError(f"{key} = {given[key]!r}, but the artefact was fitted with {fitted[key]!r}", (key,))
    return artefact._replace(about={**artefact.about, "parameters": given})


def unloaded(
    base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact, preference: Mapping[str, float] | Sequence[float]
) -> Composed:
    """The dense weights of one preference, lazily, of an artefact that was fitted for all of them (``pwe_moe``).

    ``preference`` has a weight for each expert in order, or by name.  Raises ParameterError for one that is negative or does
    not sum to 1, and as ``fused`` does.
    """
    given = dict(preference) if isinstance(preference, Mapping) else list(preference)
    return fused(base, experts, with_parameters(artefact, {"preference": given}))


def fused(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Composed:
    """The weights that an artefact makes of the models that it was fitted for, lazily.

    With those of routed layers if the method keeps its experts; a folder of them can be loaded.
    Raises CheckpointError if these are other models, ParameterError for an artefact of other parameters.
    """
    _require_models(base, experts, artefact)
    bound = method(artefact.about["method"], artefact.about["parameters"])
    return Composed(
        {"base": base} | dict(experts),
        functools.partial(_outcome, bound, artefact),
        method=artefact.about["method"],
        identity=f"{fingerprint(artefact.tensors)} {json.dumps(dict(artefact.about), sort_keys=True)}",
    )


def applied(network: nn.Module, base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> nn.Module:
    """The network that an artefact makes of one with the base's layout, which is used up; in evaluation mode.

    Raises CheckpointError if these are other models than it was fitted for, ParameterError for other parameters.
    """
    _require_models(base, experts, artefact)
    bound = method(artefact.about["method"], artefact.about["parameters"])
    weights = bound.build(base, experts, artefact)
    made = routed(network, artefact.about.get("layers", {}), weights)
    fill(made, Select(weights, base.specs.__contains__))  # routed layers have taken the rest
    object.__setattr__(made, "artefact", artefact)  # no tensor, so no business of the module's
    return made.eval()


def _require_models(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> None:
    about = artefact.about
    given = {"base": base} | {f"experts.{name}": expert for name, expert in experts.items()}
    if list(about["models"]) != list(given):
        raise CheckpointError(f"the artefact was fitted for {', '.join(about['models'])}, not for {', '.join(given)}")
    for name, model in given.items():
        if fingerprint(model) != about["models"][name]:
            raise CheckpointError(f"{model.origin}: is not the {name} that the artefact was fitted for (the hashes differ)")


def _outcome(bound: Fusion, artefact: Artefact, inputs: Mapping[str, Checkpoint]) -> Outcome:
    experts = {name: model for name, model in inputs.items() if name != "base"}
    layers, mixture = artefact.about.get("layers"), None
    if layers is not None:
        mixture = Mixture(tuple(experts), artefact.about["parameters"], 1, functools.partial(mixture_config, layers=layers))
    return Outcome(bound.build(inputs["base"], experts, artefact), "base", {}, mixture=mixture)


def fuse(
    name: str,
    /,
    backbone: nn.Module,
    experts: Mapping[str, Source],
    *,
    tasks: Sequence[Task],
    seed: int = 0,
    protocol: Protocol = "inductive",
    device: str = "cpu",
    progress: Progress = silent,
    defend: str | Mapping[str, Any] | None = None,
    **parameters: Any,
) -> nn.Module:
    """Fuse experts into one network by a method that is fitted to unlabelled inputs of the tasks, or keeps its experts.

    Args:
        name: a registered fusion method, see ``eutectic methods``; with ``defend`` the closed form that is defended.
        backbone: the network with θ₀; it is left as it is.
        experts: by name; methods that ask an expert about a task's inputs take the one of the task's name.
        tasks: what the fused network is to do; only their inputs are seen.  Some methods need none.
        seed: fixes the result.
        protocol: ``inductive`` sees the inputs of the split ``adapt``, ``transductive`` those of ``test``.
        device: where the network runs.
        progress: is told (what, done, total).
        defend: a defence by its name, ``auto``, or a mapping of ``method`` and ``parameters``, see ``merge.defend``.
        parameters: of the method.

    Returns a network of the backbone's class in evaluation mode, with other layers where a method keeps its experts.  Its
    ``artefact`` can be saved and applied again.
    Raises UnknownNameError, ParameterError, LayoutError, TaskError, NonFiniteError, CheckpointError.
    """
    if defend is not None:
        name, parameters = defended(name, parameters, defend)
    network = copy.deepcopy(backbone).to(device)
    opened = {expert: open(source) for expert, source in experts.items()}
    base = base_of(backbone, opened)
    run = Run(seed, protocol, device, progress=progress)
    artefact = fit(name, ModelSet(network, base, opened), tasks, parameters, run)
    return applied(network, base, opened, artefact)


def base_of(backbone: nn.Module, experts: Mapping[str, Checkpoint]) -> Memory:
    """θ₀ on the processor, without those names of tied tensors that no expert has: files hold one of them."""
    known = {name for expert in experts.values() for name in expert.specs}
    state = backbone.state_dict(keep_vars=True)
    held = {id(tensor) for name, tensor in state.items() if name in known}
    kept = {name: tensor.detach().cpu() for name, tensor in state.items() if name in known or id(tensor) not in held}
    return Memory(kept, origin=type(backbone).__name__)


def save_artefact(artefact: Artefact, folder: Path, *, replace: bool = False) -> None:
    """Write a folder of ``artefact.json`` and ``model.safetensors``, whole or not at all.  Raises OutputError."""
    with published(folder, replace=replace) as partial:
        write_artefact(artefact, partial)


def write_artefact(artefact: Artefact, folder: Path) -> None:
    """Write the files of an artefact into an existing folder."""
    save_tensors(artefact.tensors, folder)
    text = json.dumps(dict(artefact.about), indent=1, ensure_ascii=False)
    (folder / _ABOUT).write_text(text + "\n", encoding="utf-8")


def load_artefact(folder: Path) -> Artefact:
    """An artefact from its folder, or from that of a model that was fused; tensors are read as they are needed.

    Raises CheckpointError naming the file that is missing or broken.
    """
    inside = folder / "artefact"
    folder = inside if inside.is_dir() else folder
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _ABOUT}: no artefact of a fusion: {error}") from None
    match about:
        case {"method": str(), "parameters": dict(), "models": dict()}:
            return Artefact(SafetensorsFile(folder / "model.safetensors"), about)
    raise CheckpointError(f"{folder / _ABOUT}: lacks a method, parameters or models")
