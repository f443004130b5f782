"""Merging linear layers by least squares on their inputs: what regmean and regmean_plusplus share.

The one matrix that does to each expert's inputs most nearly what the expert's own does:

    min_W  Σₖ E ‖(W − Wₖ) x‖²,   x the inputs of expert k      ⇒      W = (Σₖ Wₖ Gₖ) (Σₖ Gₖ)⁻¹,     Gₖ = E x xᵀ
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eutectic.checkpoint.views import Select
from eutectic.errors import NonFiniteError
from eutectic.fusion._fusion import Artefact, ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.fusion._tensors import chosen, finished, names_of, own_tasks, wide
from eutectic.merge.view import Merged
from eutectic.task import Task


class Layer(NamedTuple):
    """A linear layer's weight: its name in the checkpoints, and the modules that share it."""

    name: str
    modules: tuple[nn.Module, ...]
    transposed: bool  # [in, out], as GPT-2 has it

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a view that can be written."""
        weight = self.modules[0].get_parameter("weight").detach()
        return weight.T if self.transposed else weight


class Unit(NamedTuple):
    """What is merged at once: the linear layers of a module, and the names of all tensors that are taken from an expert.

    If a forward pass comes to the module ``once``, it can end there.
    """

    module: nn.Module
    layers: list[Layer]
    names: frozenset[str]
    once: bool


#: (network, id of a tensor → its names, run the network once) → units, in the order in which they are merged
Units = Callable[[nn.Module, Mapping[int, Sequence[str]], Callable[[], object]], list[Unit]]


def layers_of(network: nn.Module, names: Mapping[int, Sequence[str]]) -> list[Layer]:
    """The weights that only linear layers have: not one that is an embedding too."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())  # a network of them has imported it
    holders: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    return [
        Layer(names[key][0], tuple(modules), transposed)
        for key, modules in holders.items()
        for kind, transposed in ((nn.Linear, False), (conv1d, True))
        if key in names and all(isinstance(module, kind) and id(module.weight) == key for module in modules)
    ]


class _Done(Exception):
    """A forward pass went as far as it is of use."""


class Grams:
    """E x xᵀ of the inputs of layers while a network runs."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None  # an input, its version, x xᵀ

    @contextmanager
    def watching(self, unit: Unit) -> Iterator[None]:
        """See the inputs of a unit's layers for a while."""
        handles = [
            module.register_forward_pre_hook(self._hook(layer.name), with_kwargs=True)
            for layer in unit.layers
            for module in layer.modules
        ]
        if unit.once:
            handles.append(unit.module.register_forward_hook(_stop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def mean(self, name: str, shrink: float) -> Tensor | None:
        """G ``[in, in]``, its off-diagonal entries times ``shrink``; None for a layer that saw nothing."""
        if not self._tokens.get(name):
            return None
        gram = self._sums.pop(name) / self._tokens[name]
        diagonal = gram.diagonal().clone()
        gram.mul_(shrink).diagonal().copy_(diagonal)
        return gram

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())))
            if self._last is not None and self._last[0] is x and self._last[1] == x._version:
                product = self._last[2]  # query, key and value have one input
            else:
                rows = x.reshape(-1, x.shape[-1]).to(wide(x))
                product = rows.T @ rows
                self._last = (x, x._version, product)
            if name in self._sums:
                self._sums[name] += product
            else:
                self._sums[name] = product.clone()
            self._tokens[name] = self._tokens.get(name, 0) + x.numel() // x.shape[-1]

        return hook


def _stop(*_: object) -> None:
    raise _Done


class LeastSquares:
    """The sums over experts for one layer, around a matrix W₀ that stays where no input tells anything."""

    def __init__(self, around: Tensor) -> None:
        """``around`` is W₀ ``[out, in]``."""
        self.around = around
        self.total = around.new_zeros(around.shape[1], around.shape[1])
        self.moved = torch.zeros_like(around)

    def add(self, weight: Tensor, gram: Tensor) -> None:
        """Add Wₖ ``[out, in]`` and Gₖ ``[in, in]``."""
        gram = gram.to(self.around)
        self.total += gram
        self.moved += (weight.to(gram) - self.around) @ gram

    def solution(self) -> Tensor:
        """W = W₀ + (Σ (Wₖ − W₀) Gₖ) (Σ Gₖ)⁻¹ ``[out, in]`` in float64, near W₀ if there are many."""
        total, moved = self.total.double(), self.moved.double()
        size = total.diagonal().sqrt()
        size = torch.where(size > 0, size, 1.0)
        scaled = total / size / size[:, None]
        scaled.diagonal().fill_(1.0)  # also for a feature that is never there
        least = len(total) * torch.finfo(self.total.dtype).eps  # what rounding leaves of nothing
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if failed or factor.diagonal().min() ** 2 < least:
            found = moved / size @ torch.linalg.pinv(scaled, hermitian=True, rtol=least)
        else:
            found = torch.cholesky_solve((moved / size).T, factor).T
        return self.around.double() + found / size


def whole(network: nn.Module, names: Mapping[int, Sequence[str]], run_once: Callable[[], object]) -> list[Unit]:
    """All layers at once: what an expert's layers see is then what its own network makes of the inputs."""
    return [Unit(network, layers_of(network, names), frozenset(name for group in names.values() for name in group), True)]


@torch.no_grad()
def fitted(
    models: ModelSet, tasks: Sequence[Task], run: Run, units_of: Units, *, samples: int, shrink: float, batch_size: int
) -> Artefact:
    """Merge unit after unit; what comes before a unit in the network is merged already, what is in none is averaged.

    Raises NonFiniteError naming the task and layer.
    """
    network, own, names = models.network, own_tasks(models, tasks), names_of(models)
    average = Merged("average", models.base, models.experts)
    fill(network, average)
    index = {task.name: chosen(task, samples, run) for task in tasks}
    first = tasks[0]
    units = units_of(network, names, lambda: run.forward(network, first, run.arrays(first).take(index[first.name][:1])[0]))
    found: dict[str, Tensor] = {}
    for number, unit in enumerate(units):
        problems = {layer.name: LeastSquares(layer.weight.to(wide(layer.weight), copy=True)) for layer in unit.layers}
        seen = set()
        for turn, (expert, task) in enumerate(own.items()):
            fill(network, Select(models.experts[expert], unit.names.__contains__))
            grams, arrays = Grams(), run.arrays(task)
            with grams.watching(unit):
                for part in index[task.name].split(batch_size):
                    with suppress(_Done):
                        run.forward(network, task, arrays.take(part)[0])
            for layer in unit.layers:
                gram = grams.mean(layer.name, shrink)
                if gram is None:
                    continue
                if not torch.isfinite(gram).all():
                    raise NonFiniteError(f"task {task.name!r}: the inputs of the layer {layer.name!r} are not finite")
                problems[layer.name].add(layer.weight, gram)
                seen.add(layer.name)
            run.progress("Gram matrices", number * len(own) + turn + 1, len(units) * len(own))
        fill(network, Select(average, unit.names.__contains__))
        for layer in unit.layers:
            if layer.name in seen:
                solution = problems.pop(layer.name).solution()
                layer.weight.copy_(solution)
                solution = solution.T if layer.transposed else solution
                found[layer.name] = solution.to(models.base.spec(layer.name).dtype)
    return finished(found, names, models.base)
