"""Pruned task vectors, held sparse: what is left of them takes five bytes a number instead of four for every one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Turn
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.fusion._products import packed, pruned
from eutectic.fusion._routed import Description
from eutectic.fusion._routing import named
from eutectic.fusion._tensors import differences


class Packed(NamedTuple):
    """See ``_products.packed``."""

    gaps: Tensor
    values: Tensor
    counts: tuple[int, ...]


def packed_layer(base: Checkpoint, experts: Mapping[str, Checkpoint], layer: str, turned: bool, density: float) -> Packed:
    """What is left of the experts' changes of a layer's matrix, each pruned by itself."""
    deltas = differences(base, experts, named(layer, "weight"))
    return Packed(*packed(deltas.mT if turned else deltas.flatten(2), density))


@final
class Sparse(Checkpoint):
    """The pruned task vectors of routed layers, made when they are read; it owns nothing.

    A layer has ``gaps``, ``values``, and, with a bias, ``shift`` ``[N, m]``, pruned as well but not sparse.
    """

    def __init__(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], layers: Mapping[str, Description], density: float
    ) -> None:
        """``layers`` have ``counts``, as ``packed_layer`` makes them, and ``turned``."""
        self._base, self._experts, self._density = base, dict(experts), density
        self.origin, self.files = base.origin, base.files
        self._layers = {named(layer, key): (layer, key) for layer in layers for key in ("gaps", "values", "shift")}
        self._turned = {layer for layer, about in layers.items() if about["turned"]}
        self._turn, self._held = Turn(), dict[str, Packed]()
        self._specs: dict[str, TensorSpec] = {}
        for layer, about in layers.items():
            weight = base.spec(named(layer, "weight"))
            self._specs[named(layer, "gaps")] = TensorSpec((sum(about["counts"]),), torch.uint8)
            self._specs[named(layer, "values")] = TensorSpec((sum(about["counts"]),), weight.dtype)
            if named(layer, "bias") in base.specs:
                self._specs[named(layer, "shift")] = TensorSpec(
                    (len(experts), *base.spec(named(layer, "bias")).shape), weight.dtype
                )

    @property
    def specs(self) -> Layout:
        """See the class."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        layer, key = self._layers[name]
        if key == "shift":
            found = [pruned(delta, self._density) for delta in differences(self._base, self._experts, named(layer, "bias"))]
            return torch.stack(found).to(self._specs[name].dtype).flatten()[start:stop]
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
