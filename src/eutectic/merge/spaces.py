"""The coordinates in which adapters are fused: core space, KnOTS, and the concatenation of the factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from eutectic.checkpoint.peft import Adapter
from eutectic.errors import LayoutError, NonFiniteError
from eutectic.methods._cores import Frame, frame

SpaceName = Literal["core", "knots", "concat"]


class Part(NamedTuple):
    """A merged change as (B X) M (Y A), with orthonormal columns in B X and orthonormal rows in Y A."""

    B: Tensor
    X: Tensor
    M: Tensor
    Y: Tensor
    A: Tensor


@final
class Stack:
    """The adapters' factors of every target that one of them has; the others count as zero there.

    ``shapes`` are outputs and inputs by target, ``first`` the first expert that has it.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        """Raises LayoutError if two adapters have a target in different shapes, or none has any."""
        self.adapters, self.experts = dict(adapters), list(adapters)
        self.shapes: dict[str, tuple[int, int]] = {}
        self.first: dict[str, str] = {}
        for expert, adapter in adapters.items():
            for name, target in adapter.targets.items():
                if target.magnitude is not None:
                    raise LayoutError(
                        f"expert {expert!r} ({adapter.origin}) is DoRA, whose change of {name!r} has no low rank: merge into a "
                        "dense model (leave out `output: adapter`)"
                    )
                other = self.first.setdefault(name, expert)
                self.shapes.setdefault(name, adapter.shape(name))
                if (mine := _described(adapter, name)) != (its := _described(adapters[other], name)):
                    raise LayoutError(
                        f"expert {expert!r} ({adapter.origin}) has {name!r} with {mine}, {other!r} has it with {its}: "
                        "they are no adapters of one base"
                    )
        for expert, adapter in adapters.items():
            for name in adapter.replaced.keys() & self.shapes.keys():
                raise LayoutError(
                    f"expert {expert!r} replaces {name!r} as a whole, and {self.first[name]!r} has LoRA factors of it: merge "
                    "them into a dense model (leave out `output: adapter`)"
                )
        if not self.shapes:
            raise LayoutError("no adapter was given that has LoRA factors; name at least one")

    def ranks(self, name: str) -> list[int]:
        """Of each expert; 0 where it has no such target."""
        return [adapter.rank(name) if name in adapter.targets else 0 for adapter in self.adapters.values()]

    def left(self, name: str, expert: str) -> Tensor:
        """s·B ``[out, r]`` in float64.  Raises NonFiniteError."""
        if name not in self.adapters[expert].targets:
            return torch.zeros(self.shapes[name][0], 0, dtype=torch.float64)
        return self._finite(self.adapters[expert].left(name), name, expert)

    def right(self, name: str, expert: str) -> Tensor:
        """A ``[r, in]`` in float64.  Raises NonFiniteError."""
        if name not in self.adapters[expert].targets:
            return torch.zeros(0, self.shapes[name][1], dtype=torch.float64)
        return self._finite(self.adapters[expert].right(name), name, expert)

    def _finite(self, factor: Tensor, name: str, expert: str) -> Tensor:
        if not torch.isfinite(factor).all():
            origin = self.adapters[expert].origin
            raise NonFiniteError(f"expert {expert!r} ({origin}) holds a NaN or Inf in a factor of {name!r}; repair or drop it")
        return factor.double()

    def lefts(self, name: str) -> Tensor:
        """All experts' s·B side by side, ``[out, Σ r]``."""
        return torch.cat([self.left(name, expert) for expert in self.adapters], 1)

    def rights(self, name: str) -> Tensor:
        """All experts' A on top of each other, ``[Σ r, in]``."""
        return torch.cat([self.right(name, expert) for expert in self.adapters])

    def frame(self, name: str) -> Frame:
        """The bases that the experts share, and their coordinates."""
        return frame(self.lefts(name), self.rights(name), self.ranks(name))


def _described(adapter: Adapter, name: str) -> str:
    """A target's shape in words, which differ where two adapters cannot be of one weight."""
    outputs, inputs = adapter.shape(name)
    window = adapter.file.specs[adapter.targets[name].a].shape[2:]
    lies = ", transposed" if adapter.targets[name].turned else f", windows of {list(window)}" if window else ""
    return f"{outputs} outputs and {inputs} inputs{lies}"


class Space(ABC):
    """Coordinates of every target's changes, all of a target in one shape, and the way back.

    The shared bases are found at once, which reads the factors; what is kept of them is small.
    """

    def __init__(self, stack: Stack) -> None:
        """Raises NonFiniteError for a factor that is not finite."""
        self.stack = stack
        self.frames = {name: stack.frame(name) for name in stack.shapes}

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a target's coordinates."""

    @abstractmethod
    def coordinates(self, name: str, expert: str) -> Tensor:
        """Of one expert's change, in float64."""

    @abstractmethod
    def part(self, name: str, merged: Tensor) -> Part:
        """A merged change from its coordinates."""

    def rank(self, name: str) -> int:
        """The most that a merged change may have."""
        return min(self.frames[name].X.shape[1], self.frames[name].Y.shape[0])


@final
class Core(Space):
    """Mᵢ = Uᵀ ΔWᵢ V, at most Σ rᵢ × Σ rᵢ."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The ranks of the experts' changes side by side, and on top of each other."""
        return self.frames[name].X.shape[1], self.frames[name].Y.shape[0]

    def coordinates(self, name: str, expert: str) -> Tensor:
        """Mᵢ."""
        found, position = self.frames[name], self.stack.experts.index(expert)
        return found.left_K[position] @ found.right_K[position]

    def part(self, name: str, merged: Tensor) -> Part:
        """U M Vᵀ."""
        return Part(self.stack.lefts(name), self.frames[name].X, merged, self.frames[name].Y, self.stack.rights(name))


@final
class Knots(Space):
    """Pᵢ = Uᵀ ΔWᵢ, at most Σ rᵢ × n: the columns Σ Vᵢᵀ of KnOTS' decomposition of [ΔW₁ … ΔW_T]."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The rank of the experts' changes side by side, and the inputs."""
        return self.frames[name].X.shape[1], self.stack.shapes[name][1]

    def coordinates(self, name: str, expert: str) -> Tensor:
        """Pᵢ."""
        return self.frames[name].left_K[self.stack.experts.index(expert)] @ self.stack.right(name, expert)

    def part(self, name: str, merged: Tensor) -> Part:
        """U P."""
        Q, R = torch.linalg.qr(merged.T)
        return Part(self.stack.lefts(name), self.frames[name].X, R.T, torch.eye(len(R)).double(), Q.T)

    def rank(self, name: str) -> int:
        """That of the experts' changes side by side: an election leaves V's space."""
        return min(self.shape(name))


@final
class Concat(Space):
    """The factors side by side, [w₁s₁B₁ … w_T s_T B_T] [A₁; …; A_T]; the coordinates are which columns are an expert's."""

    def shape(self, name: str) -> tuple[int, ...]:
        """One number a column."""
        return (sum(self.stack.ranks(name)),)

    def coordinates(self, name: str, expert: str) -> Tensor:
        """1 for the expert's columns, 0 for others."""
        own = [float(other == expert) for other in self.stack.experts]
        return torch.tensor(own).double().repeat_interleave(torch.tensor(self.stack.ranks(name)))

    def part(self, name: str, merged: Tensor) -> Part:
        """B diag(w) A."""
        found = self.frames[name]
        M = torch.cat(found.left_K, 1) * merged @ torch.cat(found.right_K)
        return Part(self.stack.lefts(name), found.X, M, found.Y, self.stack.rights(name))


SPACES: dict[SpaceName, type[Space]] = {"core": Core, "knots": Knots, "concat": Concat}
