"""Adapters of one base fused into an adapter, by any method on task vectors, in coordinates that lose nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Spread, Turn
from eutectic.checkpoint.lora import Lora, require_fit
from eutectic.checkpoint.peft import Adapter, replaced_key
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.checkpoint.views import Select
from eutectic.errors import LayoutError, ParameterError, did_you_mean
from eutectic.merge.compose import Joined
from eutectic.merge.spaces import SPACES, Space, SpaceName, Stack
from eutectic.merge.view import Merged, Override
from eutectic.methods._cores import thinned
from eutectic.methods._method import build

#: methods whose result is Σ wₖ τₖ, which a concatenation of the factors is, too
LINEAR = ("average", "task_arithmetic")
#: targets whose factors are kept after a read: A and B of one are read one after the other, by two threads
HELD = 2


@final
class Coordinates(Checkpoint):
    """One expert's changes, or no change, in the coordinates of a space, by the names of the targets."""

    def __init__(self, space: Space, expert: str | None, origin: str) -> None:
        """Without an expert all are zero: the base."""
        self._space, self._expert, self.origin = space, expert, origin

    @functools.cached_property
    def specs(self) -> Layout:
        """The space's shapes, in float64."""
        return {name: TensorSpec(self._space.shape(name), torch.float64) for name in self._space.frames}

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        if self._expert is None:
            return torch.zeros(stop - start, dtype=torch.float64)
        return self._space.coordinates(name, self._expert).reshape(-1)[start:stop]

    def grain(self, name: str) -> int:
        """All of a target's are computed together."""
        return self.specs[name].numel


class Loss(NamedTuple):
    """‖·‖² of what a rank leaves of a change, and of the change."""

    lost: float
    whole: float


@final
class Fused(Checkpoint):
    """The adapter that is a merge of adapters, as a lazy checkpoint with PEFT's names; it owns the adapters, not the base.

    Every target is merged in the coordinates of ``space``, to which a method's scopes apply, and comes back with its singular
    values in equal parts in B and A.  Tensors that an adapter replaces as a whole are merged as always, over the base.
    ``notes`` are for people, ``losses`` says by target what ``rank`` cost among those that were read.
    """

    def __init__(
        self,
        method: str,
        adapters: Mapping[str, Adapter],
        parameters: Mapping[str, Any] | None = None,
        overrides: Sequence[Override] = (),
        *,
        base: Checkpoint | None = None,
        space: SpaceName = "core",
        rank: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Find the shared coordinates, which reads the factors once, and bind the method.

        Args:
            method: a registered name, of one that works on task vectors, or ``average``.
            adapters: name → adapter, at least one.
            parameters: of the method.
            overrides: for some targets; later ones win.
            base: needed only for tensors that an adapter replaces as a whole; if given, the adapters must fit it.
            space: ``core``, ``knots``, or for linear methods ``concat``.
            rank: of the result at most; all that it takes by default.
            dtype: of the result; the adapters' widest by default.

        Raises:
            LayoutError: adapters of different bases, DoRA, or no base where one is needed.
            CheckpointError: an adapter does not fit the base.
            ParameterError, UnknownNameError: the method, its parameters, or the space.
            NonFiniteError: a NaN or Inf in a factor.
        """
        if rank is not None and rank < 1:
            raise ParameterError(f"rank = {rank}: an adapter has at least rank 1")
        _require_suitable(method, parameters or {}, space)
        self.method, self.adapters, self.base, self.rank = method, dict(adapters), base, rank
        self.files = tuple(dict.fromkeys(file for adapter in adapters.values() for file in adapter.files))
        self.notes = tuple(_notes(adapters))
        self.replaced = tuple(dict.fromkeys(name for adapter in adapters.values() for name in adapter.replaced))
        if base is not None:
            for adapter in adapters.values():
                require_fit(adapter, base)
        stack = Stack(adapters)
        self._space = SPACES[space](stack)
        start = self._with_replaced(Coordinates(self._space, None, "no change"), base)
        experts = {
            expert: self._with_replaced(Coordinates(self._space, expert, adapter.origin), base, adapter)
            for expert, adapter in adapters.items()
        }
        self.merged = Merged(method, start, experts, parameters, overrides)
        self.parameters, self.experts = self.merged.parameters, list(adapters)
        self.origin = f"{self.merged.origin} in {space} space"
        held = [adapter.file.specs[target.a].dtype for adapter in adapters.values() for target in adapter.targets.values()]
        self._dtype = dtype or functools.reduce(torch.promote_types, held)
        self._factor: dict[str, tuple[str, int]] = {}
        self._specs: dict[str, TensorSpec] = {}
        for name in stack.shapes:
            like = adapters[stack.first[name]]
            for position, key in enumerate(like.targets[name][:2]):
                shape, r = like.file.specs[key].shape, self.rank_of(name)
                self._specs[key] = TensorSpec((r, *shape[1:]) if position == 0 else (shape[0], r, *shape[2:]), self._dtype)
                self._factor[key] = name, position
        self._below = {key: name for key, (name, _) in self._factor.items()}
        self._below |= {replaced_key(name, stack.shapes): name for name in self.replaced}
        self._specs |= {key: self.merged.specs[name] for key, name in self._below.items() if key not in self._factor}
        self.losses: dict[str, Loss] = {}
        self._turn, self._held = Turn(), dict[str, tuple[Tensor, Tensor]]()

    def _with_replaced(self, coordinates: Checkpoint, base: Checkpoint | None, adapter: Adapter | None = None) -> Checkpoint:
        """Beside coordinates the tensors that some adapter replaces as a whole, as one adapter or the base has them."""
        if not self.replaced:
            return coordinates
        if base is None:
            expert = next(expert for expert, adapter in self.adapters.items() if self.replaced[0] in adapter.replaced)
            raise LayoutError(
                f"expert {expert!r} replaces {self.replaced[0]!r} as a whole, and what that changes is known only over the "
                "base: name the `base`"
            )
        whole = Select(base if adapter is None else Lora(base, adapter), self.replaced)
        return Joined([coordinates, whole], coordinates.origin)

    @property
    def specs(self) -> Layout:
        """PEFT's names, ranks and the result's dtype."""
        return self._specs

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """The adapters' files by the experts' names."""
        return {expert: adapter.file for expert, adapter in self.adapters.items()}

    @property
    def targets(self) -> list[str]:
        """The base's weights that are adapted."""
        return list(self._space.frames)

    def rank_of(self, name: str) -> int:
        """The rank that a target has in the result."""
        return self._space.rank(name) if self.rank is None else min(self.rank, self._space.rank(name))

    @property
    def error(self) -> float:
        """What ``rank`` left out of the merged changes that were read: its share of their norm, from 0 to 1."""
        lost, whole = (math.fsum(part) for part in zip(*self.losses.values(), strict=True)) if self.losses else (0.0, 0.0)
        return math.sqrt(lost / whole) if whole else 0.0

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._factor:
            return self.merged._read(self._below[name], start, stop)
        target, position = self._factor[name]
        return self._factors(target)[position].reshape(-1)[start:stop]

    def _factors(self, target: str) -> tuple[Tensor, Tensor]:
        """A and B of a target, computed for the first of them that is read."""
        with self._turn:
            found = self._held.get(target)
            if found is None:
                part = self._space.part(target, self.merged.read(target))
                left, right, lost, whole = thinned(part.M, self.rank_of(target))
                self.losses[target] = Loss(lost, whole)
                found = (right @ part.Y @ part.A).to(self._dtype), (part.B @ (part.X @ left)).to(self._dtype)
                kept = list(self._held.items())
                self._held = dict(kept[max(0, len(kept) + 1 - HELD) :]) | {target: found}
            return found

    def grain(self, name: str) -> int:
        """A target's factors are computed as a whole."""
        return self._specs[name].numel if name in self._factor else self.merged.grain(self._below[name])

    def passes(self) -> int:
        """How many times the factors are read: for the bases, for each measurement, and to apply."""
        return 1 + self.merged.passes()

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """Take the measurements that reading ``names`` needs."""
        self.merged.prepare(list(dict.fromkeys(self._below[name] for name in names)), spread)

    def need_bytes(self, name: str, n: int) -> int:
        """What the merge of the coordinates takes, and four copies in float64 of all the experts' factors."""
        below = self._below[name]
        if name not in self._factor:
            return self.merged.need_bytes(below, n)
        having = [adapter for adapter in self.adapters.values() if below in adapter.targets]
        factors = sum(adapter.rank(below) * sum(adapter.shape(below)) for adapter in having)
        return self.merged.need_bytes(below, self.merged.specs[below].numel) + 32 * factors

    def close(self) -> None:
        """Close the adapters."""
        for adapter in self.adapters.values():
            adapter.close()


def _require_suitable(method: str, parameters: Mapping[str, Any], space: str) -> None:
    """Refuse a space that there is not, and methods that make no sense in it."""
    if space not in SPACES:
        raise ParameterError(f"space = {space!r}.{did_you_mean(space, SPACES)}")
    if space == "concat" and method not in LINEAR:
        raise ParameterError(
            f"{method} is no weighted sum, so it cannot concatenate adapters ({' and '.join(LINEAR)} can): use space: core"
        )
    if build(method, parameters).space != "delta" and method != "average":
        raise ParameterError(
            f"{method} needs the models' whole weights, and an adapter is a change of them: take a method on task vectors "
            "(`eutectic methods`), or merge into a dense model (leave out `output: adapter`)"
        )


def _notes(adapters: Mapping[str, Adapter]) -> list[str]:
    bases = {expert: adapter.base_name for expert, adapter in adapters.items()}
    if len(set(bases.values())) < 2:
        return []
    said = ", ".join(f"{expert}: {base or 'none'}" for expert, base in bases.items())
    return [f"the adapters name different bases ({said}); their shapes fit, and the output names the first"]
