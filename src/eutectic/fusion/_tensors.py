"""Methods that end in whole tensors: which samples they look at, and how their tensors lie over the plain average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Overlay
from eutectic.errors import LayoutError, NonFiniteError, TaskError
from eutectic.fusion._coefficients import Shaped
from eutectic.fusion._fit import generator
from eutectic.fusion._fusion import Artefact, ModelSet, Run, expert_of
from eutectic.merge.view import Merged
from eutectic.task import Task


def own_tasks(models: ModelSet, tasks: Sequence[Task]) -> dict[str, Task]:
    """Expert → its own task.  Raises TaskError for a task without an expert, or an expert without a task."""
    own = {expert_of(task, models): task for task in tasks}
    for expert in models.experts:
        if expert not in own:
            raise TaskError(f"expert {expert!r} has no task of its name, so nothing is known of what it sees")
    return {expert: own[expert] for expert in models.experts}


def chosen(task: Task, samples: int, run: Run) -> Tensor:
    """Indices of at most ``samples`` of the inputs that may be seen, drawn without replacement."""
    return torch.randperm(len(run.arrays(task)), generator=generator(run.seed, task.name, "samples"))[:samples]


def names_of(models: ModelSet) -> dict[int, list[str]]:
    """The id of a network's tensor → its names, those of tied tensors together, as far as the base has them.

    Raises LayoutError if it has none of them.
    """
    found: dict[int, list[str]] = {}
    for name, tensor in models.network.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    for key, group in found.items():
        found[key] = [name for name in group if name in models.base.specs]
        if not found[key]:
            raise LayoutError(f"the network has {group[0]!r}, which {models.base.origin} lacks: is it another network's base?")
    return found


def difference(base: Checkpoint, expert: str, weights: Checkpoint, name: str) -> Tensor:
    """One tensor of an expert's task vector, in float32 or wider.  Raises NonFiniteError naming the expert and the tensor."""
    return difference_flat(base, expert, weights, name, 0, base.spec(name).numel).view(base.spec(name).shape)


def difference_flat(base: Checkpoint, expert: str, weights: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Elements ``start:stop`` of it, flattened.  Raises as ``difference`` does."""
    of_base = base.read_flat(name, start, stop)
    delta = weights.read_flat(name, start, stop).to(wide(of_base)) - of_base.to(wide(of_base))
    if not torch.isfinite(delta).all():
        raise NonFiniteError(f"expert {expert!r} ({weights.origin}) or the base holds a NaN or Inf in {name!r}")
    return delta


def differences(base: Checkpoint, experts: Mapping[str, Checkpoint], name: str) -> Tensor:
    """One tensor of all experts' task vectors, ``[N, …]``.  Raises as ``difference`` does."""
    return torch.stack([difference(base, expert, weights, name) for expert, weights in experts.items()])


def finished(tensors: Mapping[str, Tensor], names: Mapping[int, Sequence[str]], base: Checkpoint) -> Artefact:
    """Merged tensors, by the first of their names, in the base's dtypes."""
    kept = {f"tensors.{name}": tensor.to(base.spec(name).dtype).cpu() for name, tensor in tensors.items()}
    return Artefact(Memory(kept), {"names": [list(group) for group in names.values() if group[0] in tensors]})


def over_average(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
    """The artefact's tensors, and the plain average of the experts for all others."""
    return laid_over(Merged("average", base, experts), base, artefact)


def laid_over(bottom: Checkpoint, base: Checkpoint, artefact: Artefact) -> Checkpoint:
    """The artefact's tensors, and those of ``bottom`` for all others."""
    below = {name: f"tensors.{group[0]}" for group in artefact.about["names"] for name in group}
    return Overlay(bottom, Shaped(artefact.tensors, below, base.specs))


def wide(tensor: Tensor | nn.Parameter) -> torch.dtype:
    """What to compute in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
