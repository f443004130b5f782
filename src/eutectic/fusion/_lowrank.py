"""The experts' changes of matrices as low-rank factors, decomposed as they are read, one layer at a time."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from eutectic.checkpoint.base import Checkpoint, Spread, Turn, thin_over
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.checkpoint.views import Overlay, Select
from eutectic.errors import LayoutError, NonFiniteError
from eutectic.fusion._fusion import Artefact, ModelSet, Run
from eutectic.fusion._routed import Description, Turned
from eutectic.fusion._routing import linears, named
from eutectic.fusion._tensors import difference, differences, names_of, wide
from eutectic.merge.compose import Joined
from eutectic.merge.view import Merged, rounding
from eutectic.methods._spectral import WORKSPACE, Svd, sketched, svd_of_product

#: layers whose decompositions are kept after a read: two for each of two threads, as a chunk may end in the middle of a layer
HELD = 4


def most_directions(base: Checkpoint, weights: Checkpoint, name: str) -> int:
    """How many directions an expert's change of a matrix may have: all, an adapter's rank, or 0 if it is not changed."""
    found, shape = thin_over(base, weights, name), base.spec(name).shape
    if found is not None:
        return min(found.left.shape[1], *shape) if found.left.any() and found.right.any() else 0
    start = base.read(name)
    return 0 if torch.equal(weights.read(name), start) else min(start.flatten(1).shape)


def matrix_shape(base: Checkpoint, name: str, turned: bool) -> tuple[int, int]:
    """Outputs and inputs of a layer, from its weight W, Wᵀ if it is ``turned``, or a convolution's ``[m, C, h, w]``."""
    spec = base.spec(name)
    rows, columns = spec.shape[0], spec.numel // spec.shape[0]
    return (columns, rows) if turned else (rows, columns)


def change(base: Checkpoint, expert: str, weights: Checkpoint, name: str, most: int) -> Svd:
    """The strongest singular components of an expert's change of a matrix; none that is rounding.  Of a convolution's too.

    Exact if an adapter over the same weights makes it, or if it is small; else as good as ``sketched`` says.
    Raises NonFiniteError naming the expert and the tensor.
    """
    start = base.read(name)
    found = thin_over(base, weights, name)
    if found is not None:
        if not (torch.isfinite(found.left).all() and torch.isfinite(found.right).all()):
            raise NonFiniteError(f"expert {expert!r} ({weights.origin}) holds a NaN or Inf in {name!r}")
        return svd_of_product(found.left.to(wide(start)), found.right.to(wide(start)), most)
    eps = max(torch.finfo(dtype).eps for dtype in (start.dtype, weights.spec(name).dtype))
    delta = difference(base, expert, weights, name).flatten(1)
    return sketched(delta, most, zlib.crc32(name.encode()), rounding(start.to(wide(start)).flatten(1), eps))


def right_factors(parts: Sequence[Svd], directions: int) -> Tensor:
    """R ``[N, d, n]`` of the rows Vᵀ of N decompositions; zeros for what is lacking."""
    return torch.stack([F.pad(part.Vh[:directions], (0, 0, 0, max(0, directions - len(part.s)))) for part in parts])


def left_factors(parts: Sequence[Svd], rank: int) -> Tensor:
    """L ``[m, N, r]`` of the columns U S of N decompositions; zeros for what is lacking."""
    left = [part.U[:, :rank] * part.s[:rank] for part in parts]
    return torch.stack([F.pad(scaled, (0, rank - scaled.shape[1])) for scaled in left], dim=1)


class Layer(NamedTuple):
    """A layer's own tensors in the base, how many directions and which rank its factors have, and whether its weight is Wᵀ."""

    weight: str
    bias: str | None
    directions: int
    rank: int
    turned: bool = False


@final
class Factors(Checkpoint):
    """What ``LowRankExperts`` holds beside W₀ and b₀: ``right``, ``left`` and, with a bias, ``shift``, in the base's dtype.

    An expert's change of a layer is decomposed when one of its factors is read, and forgotten when ``HELD`` others of each
    expert were.  It owns nothing.
    """

    def __init__(self, base: Checkpoint, experts: Mapping[str, Checkpoint], layers: Mapping[str, Layer]) -> None:
        """``layers`` are by the prefix of their tensors' names, which ends in a dot unless it is empty."""
        self._base, self._experts, self._layers = base, dict(experts), dict(layers)
        self.origin, self.files = base.origin, base.files
        self._turns = {(prefix, expert): Turn() for prefix in layers for expert in experts}
        self._turn, self._held = Turn(), dict[tuple[str, str], Svd]()
        self._specs: dict[str, TensorSpec] = {}
        for prefix, (weight, bias, directions, rank, turned) in layers.items():
            (m, n), dtype, N = matrix_shape(base, weight, turned), base.spec(weight).dtype, len(experts)
            self._specs[f"{prefix}right"] = TensorSpec((N, directions, n), dtype)
            self._specs[f"{prefix}left"] = TensorSpec((m, N, rank), dtype)
            if bias is not None:
                self._specs[f"{prefix}shift"] = TensorSpec((N, m), dtype)

    @property
    def specs(self) -> Layout:
        """See the class."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        prefix, key = _split(name)
        return self._of(prefix, key).to(self._specs[name].dtype).reshape(-1)[start:stop]

    def _of(self, prefix: str, key: str) -> Tensor:
        _, bias, directions, rank, _ = self._layers[prefix]
        if key == "shift" and bias is not None:
            return differences(self._base, self._experts, bias)
        names = list(self._experts)
        order = names if key == "right" else reversed(names)  # two threads at one layer come to meet each other
        parts = {expert: self._part(prefix, expert) for expert in order}
        ordered = [parts[expert] for expert in names]
        return right_factors(ordered, directions) if key == "right" else left_factors(ordered, rank)

    def _part(self, prefix: str, expert: str) -> Svd:
        weight, _, directions, rank, turned = self._layers[prefix]
        with self._turns[prefix, expert]:
            found = self._held.get((prefix, expert))
            if found is None:
                found = change(self._base, expert, self._experts[expert], weight, max(directions, rank))
                found = Svd(found.Vh.T, found.s, found.U.T) if turned else found
                with self._turn:
                    while len(self._held) >= HELD * len(self._experts):
                        del self._held[next(iter(self._held))]
                    self._held[prefix, expert] = found
            return found

    def grain(self, name: str) -> int:
        """A layer is decomposed as a whole."""
        return 1 if name.endswith("shift") else self._specs[name].numel

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """As the base and the experts."""
        read = [self._layers[_split(name)[0]].weight for name in names]
        for checkpoint in (self._base, *self._experts.values()):
            checkpoint.prepare(read, spread)

    def need_bytes(self, name: str, n: int) -> int:
        """What decomposing one expert's change takes, and all factors of the layer in float32 or wider, twice."""
        prefix, key = _split(name)
        if key == "shift":
            return 8 * len(self._experts) * n
        weight, size = self._layers[prefix].weight, max(4, self._specs[name].dtype.itemsize)
        m = self._base.spec(weight).numel
        read = max(checkpoint.need_bytes(weight, m) for checkpoint in (self._base, *self._experts.values()))
        return 2 * read + WORKSPACE * m + 2 * size * (self._specs[f"{prefix}right"].numel + self._specs[f"{prefix}left"].numel)


def _split(name: str) -> tuple[str, str]:
    prefix, dot, key = name.rpartition(".")
    return prefix + dot, key


# ── the methods that keep experts so ──────────────────────────────────────────────────────────────────────────────────


def low_rank_layers(
    models: ModelSet, run: Run, rank: int, directions: int, *, patches: bool = False
) -> tuple[dict[str, Description], dict[str, list[list[str]]]]:
    """The linear layers that any expert changed: the sizes of their factors, and the base's names of weight and bias.

    No more than a matrix has, or than adapters have.  See ``linears`` for ``patches``.  Raises LayoutError if there are none.
    """
    base, experts = models.base, models.experts
    names, layers = names_of(models), linears(models.network, patches)
    sizes, own = dict[str, Description](), dict[str, list[list[str]]]()
    for number, (layer, linear) in enumerate(layers.items(), start=1):
        run.progress("linear layers", number, len(layers))
        groups = [names[id(p)] for p in linear.parameters()]
        weight, *bias = (group[0] for group in groups)
        most = max(most_directions(base, expert, weight) for expert in experts.values())
        if most or not all(torch.equal(base.read(name), expert.read(name)) for name in bias for expert in experts.values()):
            own[layer] = groups
            sizes[layer] = {
                **{"kind": "low_rank", "experts": len(experts), "turned": isinstance(linear, Turned)},
                **{"directions": min(directions, most), "rank": min(rank, most)},
            }
    if not sizes:
        raise LayoutError(f"no expert differs from the base in any of {len(layers)} linear layers, so there is nothing to keep")
    return sizes, own


def with_factors(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact, *, averaged: bool) -> Checkpoint:
    """The factors of an artefact's layers and its own tensors, over the base, or over the experts' average elsewhere."""
    sizes, layers, kept = artefact.about["layers"], dict[str, Layer](), set[str]()
    for layer in sizes:
        groups = artefact.about["own"][layer]
        weight, bias = (*(group[0] for group in groups), None)[:2]
        layers[named(layer, "")] = Layer(weight, bias, *(sizes[layer][key] for key in ("directions", "rank", "turned")))
        kept.update(name for group in groups for name in group)
    below = Overlay(Merged("average", base, experts), Select(base, kept.__contains__)) if averaged else base
    return Joined([below, Factors(base, experts, layers), artefact.tensors], below.origin)
