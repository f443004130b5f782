"""Hidden units of a network's MLPs: how active they are, what it predicts without some, and weights from which they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from eutectic.errors import LayoutError
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Run
from eutectic.fusion._mixing import MLP as LAYERS
from eutectic.fusion._mixing import blocks_of
from eutectic.fusion._routed import Turned, module_of
from eutectic.security.defences._defended import agreement

Choice = TypeVar("Choice")
#: of a module and its positional arguments; what it gives, if anything, are other arguments
Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]


class Units(NamedTuple):
    """The hidden units of one MLP: what reads them, the module itself, how many there are, and whether its weight is Wᵀ."""

    module: nn.Module
    width: int
    transposed: bool


def hidden_units(network: nn.Module) -> dict[str, Units]:
    """The units of each MLP, by the name of the layer that reads them.

    Raises LayoutError for a network without MLPs, or one of which the last layer does not read what the others give.
    """
    found = {}
    for layers in blocks_of(network, LAYERS).values():
        *before, (name, last) = layers.items()
        if not before or any(layer.out_features != last.in_features for _, layer in before):
            raise LayoutError(f"layer {name!r} reads {last.in_features} numbers, which no layers of its block give")
        found[name] = Units(module_of(last), last.in_features, isinstance(last, Turned))
    return found


@contextmanager
def _hooked(units: Mapping[str, Units], hooks: Mapping[str, Hook]) -> Iterator[None]:
    """For a while what reads the units is preceded by hooks."""
    handles = [units[name].module.register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scaled(units: Mapping[str, Units], scales: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """For a while the activations of units are multiplied by ``scales`` ``[width]``; gradients go through these."""

    def by(scale: Tensor) -> Hook:
        return lambda module, args: (args[0] * scale.to(args[0]), *args[1:])

    return _hooked(units, {name: by(scale) for name, scale in scales.items()})


@torch.no_grad()
def activity(network: nn.Module, units: Mapping[str, Units], batches: Batches, run: Run, most: int = 64) -> dict[str, Tensor]:
    """The sum of |activation| ``[width]`` of each unit, over places and over at most so many inputs a task, none held out."""
    sums = {name: torch.zeros(one.width, dtype=torch.float64) for name, one in units.items()}

    def into(total: Tensor) -> Hook:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            total.add_(args[0].abs().flatten(0, -2).sum(0, dtype=torch.float64).cpu())

        return add

    with _hooked(units, {name: into(total) for name, total in sums.items()}):
        for task in batches.tasks:
            for index in batches.learn[task.name][:most].split(64):
                run.forward(network, task, batches.inputs(task, index))
    return sums


def agreeing(
    network: nn.Module,
    units: Mapping[str, Units],
    kept: Mapping[Choice, Mapping[str, Tensor]],
    batches: Batches,
    teacher: Mapping[str, Tensor],
    run: Run,
) -> list[tuple[Choice, float]]:
    """(choice, agreement with the teacher on held-out inputs) of a network with the units that each choice keeps."""
    found = []
    for number, (choice, gates) in enumerate(kept.items()):
        run.progress("pruning", number, len(kept))
        with scaled(units, gates):
            found.append((choice, agreement(network, batches, teacher, run)))
    return found


def furthest(looked: Sequence[tuple[Choice, float]], budget: float) -> Choice:
    """Of lines (choice, agreement), the first of which is to do nothing, the last that agrees as often, less ``budget``."""
    return [choice for choice, agrees in looked if agrees >= looked[0][1] - budget][-1]


@torch.no_grad()
def cut(units: Mapping[str, Units], gates: Mapping[str, Tensor]) -> None:
    """Multiply the weights that read units by ``gates`` ``[width]``: what ``scaled`` does to activations, for good."""
    for name, gate in gates.items():
        weight = units[name].module.get_parameter("weight")
        weight.mul_(gate.to(weight)[:, None] if units[name].transposed else gate.to(weight))


def pruned_share(gates: Mapping[str, Tensor]) -> float:
    """The share of units that are not kept."""
    return 1 - sum(float(gate.sum()) for gate in gates.values()) / sum(gate.numel() for gate in gates.values())
