"""Pruned task vectors, held sparse: what is left of them takes five bytes a number instead of four for every one.

Entries of N matrices ``[m, n]`` lie in the order of ``[N, m, n]``.  ``gaps`` ``[e]`` has the distance of each from the one
before it, as one byte; where that is larger than 255, entries of value 0 lie between.  ``values`` ``[e]`` has what they are.
For every ``ROWS`` rows of a matrix, ``starts`` has the first entry at or after them, and the place of the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Turn
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.fusion._routing import ROWS, Description, named
from eutectic.fusion._tensors import difference


class Packed(NamedTuple):
    """See the module; ``starts`` is ``[N b + 1, 2]``."""

    gaps: Tensor
    values: Tensor
    starts: Tensor


def pruned(delta: Tensor, density: float) -> Tensor:
    """A tensor with zeros for all but the largest entries, a share ``density`` of all; those of equal size go together."""
    kept = round(density * delta.numel())
    if kept >= delta.numel():
        return delta
    least = delta.abs().flatten().kthvalue(delta.numel() - kept).values
    return torch.where(delta.abs() > least, delta, 0)


def packed(deltas: Tensor) -> Packed:
    """What is not zero in ``[N, m, n]``."""
    N, m, n = deltas.shape
    flat = deltas.flatten()
    places = flat.nonzero()[:, 0]
    gaps = places.diff(prepend=places.new_tensor([-1]))
    fillers = (gaps - 1) // 255
    runs = fillers + 1
    last = runs.cumsum(0) - 1  # where the entries themselves are, after their fillers
    found = torch.full((int(runs.sum()),), 255, dtype=torch.uint8)
    found[last] = (gaps - 255 * fillers).to(torch.uint8)
    values = flat.new_zeros(len(found))
    values[last] = flat[places]
    every = found.long().cumsum(0) - 1
    blocks = torch.arange(N)[:, None] * m * n + torch.arange(0, m, ROWS) * n
    first = torch.searchsorted(every, torch.cat([blocks.flatten(), torch.tensor([flat.numel()])]))
    before = torch.cat([torch.tensor([-1]), every])[first]
    return Packed(found, values, torch.stack([first, before], 1))


def pruned_vectors(base: Checkpoint, experts: Mapping[str, Checkpoint], name: str, density: float) -> Tensor:
    """The task vectors ``[N, …]`` of a tensor, each pruned by itself.  Raises NonFiniteError naming the expert."""
    return torch.stack([pruned(difference(base, expert, weights, name), density) for expert, weights in experts.items()])


def packed_layer(base: Checkpoint, experts: Mapping[str, Checkpoint], layer: str, turned: bool, density: float) -> Packed:
    """What is left of the experts' changes of a layer's matrix."""
    deltas = pruned_vectors(base, experts, named(layer, "weight"), density)
    return packed(deltas.mT if turned else deltas)


@final
class Sparse(Checkpoint):
    """The pruned task vectors of routed layers, made when they are read; it owns nothing.

    A layer has ``gaps``, ``values``, ``starts``, and, with a bias, ``shift`` ``[N, m]``, pruned as well but not sparse.
    """

    def __init__(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], layers: Mapping[str, Description], density: float
    ) -> None:
        """``layers`` have ``entries``, as many as ``packed_layer`` makes, and ``turned``."""
        self._base, self._experts, self._density = base, dict(experts), density
        self.origin, self.files = base.origin, base.files
        self._layers = {named(layer, key): (layer, key) for layer in layers for key in ("gaps", "values", "starts", "shift")}
        self._turned = {layer for layer, about in layers.items() if about["turned"]}
        self._turn, self._held = Turn(), dict[str, Packed]()
        self._specs: dict[str, TensorSpec] = {}
        for layer, about in layers.items():
            weight = base.spec(named(layer, "weight"))
            m = weight.shape[-1 if about["turned"] else 0]
            self._specs[named(layer, "gaps")] = TensorSpec((about["entries"],), torch.uint8)
            self._specs[named(layer, "values")] = TensorSpec((about["entries"],), weight.dtype)
            self._specs[named(layer, "starts")] = TensorSpec((len(experts) * math.ceil(m / ROWS) + 1, 2), torch.int64)
            if named(layer, "bias") in base.specs:
                self._specs[named(layer, "shift")] = TensorSpec((len(experts), m), weight.dtype)

    @property
    def specs(self) -> Layout:
        """See the class."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        layer, key = self._layers[name]
        if key == "shift":
            found = pruned_vectors(self._base, self._experts, named(layer, "bias"), self._density)
            return found.to(self._specs[name].dtype).flatten()[start:stop]
        with self._turn:
            if layer not in self._held:
                self._held = {layer: packed_layer(self._base, self._experts, layer, layer in self._turned, self._density)}
            found = self._held[layer]
        return getattr(found, key).to(self._specs[name].dtype).flatten()[start:stop]

    def grain(self, name: str) -> int:
        """A layer is packed as a whole."""
        return self._specs[name].numel

    def need_bytes(self, name: str, n: int) -> int:
        """All experts' matrices, and the places of their entries."""
        layer, _ = self._layers[name]
        return 16 * len(self._experts) * self._base.spec(named(layer, "weight")).numel
