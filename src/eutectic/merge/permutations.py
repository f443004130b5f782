"""Networks without a common base: their units are numbered differently, and are brought into one order before they are merged.

A *group* is a set of units (hidden neurons, channels, attention heads) with the axes of tensors that they index.  Permuting all
of a group's axes alike does not change what the network computes.  Groups are described by patterns,

    {"mlp": ["layers.*.fc1.weight:0", "layers.*.fc1.bias:0", "layers.*.fc2.weight:1"]}

where * stands for the same text in all patterns of a group, so that this is one group for each layer; the number is the axis.
An axis may hold a block of entries for each unit: the rows of a head, or the pixels of a channel that was flattened.

Source: Ainsworth, Hayase and Srinivasa, "Git Re-Basin: merging models modulo permutation symmetries", ICLR 2023,
arXiv:2209.04836, Algorithm 1 (weight matching).  Differs from the paper in that it stops when no group gains more than rounding
does, so that it ends in floating point too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.spec import Layout, require_same_layout
from eutectic.errors import LayoutError, MissingDependencyError, NonFiniteError


class Group(NamedTuple):
    """So many units, and the tensors' axes that they index."""

    units: int
    axes: tuple[tuple[str, int], ...]


Patterns = Mapping[str, Sequence[str]]

#: the hidden units and the heads of a vision transformer with a Hugging Face ``Dinov2Model``'s names
DINOV2: Patterns = {
    "mlp": [
        *("encoder.layer.*.mlp.fc1.weight:0", "encoder.layer.*.mlp.fc1.bias:0"),
        "encoder.layer.*.mlp.fc2.weight:1",
    ],
    "heads": [
        *(f"encoder.layer.*.attention.attention.{n}.{p}:0" for n in ("query", "key", "value") for p in ("weight", "bias")),
        "encoder.layer.*.attention.output.dense.weight:1",
    ],
}


def groups_by_pattern(patterns: Patterns, layout: Layout, units: Mapping[str, int] | None = None) -> dict[str, Group]:
    """The groups that patterns describe in a layout; ``units`` says how many there are where an axis has blocks, as of heads.

    By default it is the shortest of the group's axes.  Raises LayoutError for a pattern that matches nothing, or axes that do
    not hold that many units.
    """
    found: dict[str, Group] = {}
    for name, axes in patterns.items():
        parsed = [(tensor, int(axis)) for tensor, _, axis in (one.rpartition(":") for one in axes)]
        first = re.compile("(.+)".join(map(re.escape, parsed[0][0].split("*"))))
        stems = [match.groups() for match in map(first.fullmatch, layout) if match]
        if not stems:
            raise LayoutError(f"permutation group {name!r}: no tensor is called {parsed[0][0]!r}")
        for stem in stems:
            part = stem[0] if stem else ""
            own = tuple((tensor.replace("*", part), axis) for tensor, axis in parsed)
            label = f"{name}.{part}" if stem else name
            found[label] = _checked(label, own, layout, (units or {}).get(name))
    return found


def _checked(label: str, axes: tuple[tuple[str, int], ...], layout: Layout, units: int | None) -> Group:
    for tensor, axis in axes:
        if tensor not in layout or axis >= len(layout[tensor].shape):
            raise LayoutError(f"permutation group {label!r}: there is no axis {axis} of a tensor {tensor!r}")
    lengths = [layout[tensor].shape[axis] for tensor, axis in axes]
    units = units or min(lengths)
    for (tensor, axis), length in zip(axes, lengths, strict=True):
        if length % units:
            raise LayoutError(f"permutation group {label!r}: axis {axis} of {tensor!r} has {length} entries for {units} units")
    return Group(units, axes)


def groups_of_sequential(network: nn.Sequential) -> dict[str, Group]:
    """The hidden units of an MLP, or the channels of a plain CNN, with the batch norms among them.

    Raises LayoutError for a layer that has parameters and is not linear, a convolution or a batch norm.
    """
    axes: list[list[tuple[str, int]]] = [[]]
    for name, layer in network.named_children():
        own = dict(layer.named_parameters()) | dict(layer.named_buffers())
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                raise LayoutError(f"layer {name!r}: a convolution in groups mixes no two of them")
            axes[-1].append((f"{name}.weight", 1))
            axes.append([(f"{name}.{tensor}", 0) for tensor in own])
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            axes[-1] += [(f"{name}.{tensor}", 0) for tensor, value in own.items() if value.ndim]
        elif own:
            raise LayoutError(f"layer {name!r}: of a {type(layer).__name__} it is not known what permuting its inputs changes")
    layout = Memory(network.state_dict()).specs
    return {f"{i}": _checked(f"{i}", tuple(each), layout, None) for i, each in enumerate(axes[1:-1])}


Permutations = Mapping[str, Tensor]  # group → which unit comes first, second …, [units]


def permuted(tensors: Mapping[str, Tensor], groups: Mapping[str, Group], permutations: Permutations) -> dict[str, Tensor]:
    """The same network with its units in another order."""
    found = dict(tensors)
    for name, order in permutations.items():
        units, axes = groups[name]
        for tensor, axis in axes:
            found[tensor] = _blocks(found[tensor], axis, units).index_select(axis, order).flatten(axis, axis + 1)
    return found


def _blocks(x: Tensor, axis: int, units: int) -> Tensor:
    return x.unflatten(axis, (units, -1))


def match(
    target: Mapping[str, Tensor], moving: Mapping[str, Tensor], groups: Mapping[str, Group], *, seed: int = 0, sweeps: int = 100
) -> dict[str, Tensor]:
    """Permutations of the moving network's units that bring its weights nearest to the target's, in the sum of squares.

    Groups depend on each other, so they are solved in turn, each exactly given the others, until none gains: a local optimum.
    The seed orders the turns.  Raises MissingDependencyError without scipy, NonFiniteError naming the tensor.
    """
    assignment = _assignment()
    for where, tensors in (("the target's", target), ("the other's", moving)):
        for name in {tensor for group in groups.values() for tensor, _ in group.axes}:
            if not torch.isfinite(tensors[name]).all():
                raise NonFiniteError(f"{where} {name!r} has entries that are not finite, so nothing is nearest to it")
    found = {name: torch.arange(group.units) for name, group in groups.items()}
    now = {name: tensor.double() for name, tensor in moving.items()}
    fixed = {name: tensor.double() for name, tensor in target.items()}
    generator, names = torch.Generator().manual_seed(seed), list(groups)
    for _ in range(sweeps):
        better = False
        for place in torch.randperm(len(names), generator=generator).tolist():
            name = names[place]
            units, axes = groups[name]
            gain = torch.zeros(units, units, dtype=torch.float64)
            for tensor, axis in axes:
                a, b = (_blocks(x[tensor], axis, units).movedim(axis, 0).flatten(1) for x in (fixed, now))
                gain += a @ b.T
            order = torch.as_tensor(assignment(gain.numpy(), maximize=True)[1])
            before, after = gain.diagonal().sum(), gain[torch.arange(units), order].sum()
            if after > before + 1e-9 * gain.abs().sum() / units:
                now = permuted(now, groups, {name: order})
                found[name], better = found[name][order], True
        if not better:
            break
    return found


def aligned(target: Checkpoint, moving: Checkpoint, groups: Mapping[str, Group], *, seed: int = 0) -> Memory:
    """The moving network in the target's order of units, ready to be merged with it; both are held in memory.

    Raises LayoutError for networks of different layouts, and as ``match`` does.
    """
    require_same_layout(target.specs, moving.specs, target.origin, moving.origin)
    fixed, other = ({name: model.read(name) for name in model.specs} for model in (target, moving))
    return Memory(permuted(other, groups, match(fixed, other, groups, seed=seed)), f"{moving.origin}, aligned")


def _assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependencyError("matching units needs scipy: pip install 'eutectic[align]'") from None
    return linear_sum_assignment
