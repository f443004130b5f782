"""The coordinates in which adapters are fused: core space, KnOTS, and the concatenation of the factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, final

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
        self.adapters = dict(adapters)
        self.shapes: dict[str, tuple[int, int]] = {}
        self.first: dict[str, str] = {}
        for expert, adapter in adapters.items():
            for name, target in adapter.targets.items():
                if target.magnitude is not None:
                    raise LayoutError(
                        f"expert {expert!r} ({adapter.origin}) is DoRA, whose change of {name!r} has no low rank: merge into a "
                        "dense model (leave out `output: adapter`)"
                    )
                shape, other = adapter.shape(name), self.first.setdefault(name, expert)
                found = self.shapes.setdefault(name, shape)
                if found != shape or adapters[other].targets[name].turned != target.turned:
                    raise LayoutError(
                        f"expert {expert!r} ({adapter.origin}) has {name!r} with {shape[0]} outputs and {shape[1]} inputs, "
                        f"{other!r} has it with {found[0]} and {found[1]}: they are no adapters of one base"
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

    def part(self, name: str, M: Tensor) -> Part:
        """U M Vᵀ in the bases that the experts share."""
        B, A = self.lefts(name), self.rights(name)
        found = frame(B, A, self.ranks(name))
        return Part(B, found.X, M, found.Y, A)


class Space(Protocol):
    """Coordinates of every target's changes, all of a target in one shape, and the way back."""

    shapes: dict[str, tuple[int, ...]]

    def coordinates(self, name: str, expert: str) -> Tensor:
        """Of one expert's change, in float64."""
        ...

    def rank(self, name: str) -> int:
        """The most that a merged change may have."""
        ...

    def part(self, name: str, merged: Tensor) -> Part:
        """A merged change from its coordinates."""
        ...


@final
class Core:
    """Mᵢ = Uᵀ ΔWᵢ V, at most Σ rᵢ × Σ rᵢ."""

    def __init__(self, stack: Stack) -> None:
        """Find the bases of every target; what is kept of them is small."""
        self._stack = stack
        frames = {name: stack.frame(name)[2:] for name in stack.shapes}
        self._small = {
            (name, expert): (left, right)
            for name, (left_K, right_K) in frames.items()
            for expert, left, right in zip(stack.adapters, left_K, right_K, strict=True)
        }
        self.shapes: dict[str, tuple[int, ...]] = {
            name: (left_K[0].shape[0], right_K[0].shape[1]) for name, (left_K, right_K) in frames.items()
        }

    def coordinates(self, name: str, expert: str) -> Tensor:
        """Of one expert's change, in float64."""
        left, right = self._small[name, expert]
        return left @ right

    def rank(self, name: str) -> int:
        """The most that a merged change may have."""
        return min(self.shapes[name])

    def part(self, name: str, merged: Tensor) -> Part:
        """A merged change from its coordinates."""
        return self._stack.part(name, merged)


@final
class Knots:
    """Pᵢ = Uᵀ ΔWᵢ, at most Σ rᵢ × n: the columns Σ Vᵢᵀ of KnOTS' decomposition of [ΔW₁ … ΔW_T]."""

    def __init__(self, stack: Stack) -> None:
        """Find the basis of every target; what is kept of it is small."""
        self._stack = stack
        lefts = {name: stack.frame(name).left_K for name in stack.shapes}
        self._small = {
            (name, expert): left for name, left_K in lefts.items() for expert, left in zip(stack.adapters, left_K, strict=True)
        }
        self.shapes: dict[str, tuple[int, ...]] = {
            name: (left_K[0].shape[0], stack.shapes[name][1]) for name, left_K in lefts.items()
        }

    def coordinates(self, name: str, expert: str) -> Tensor:
        """Of one expert's change, in float64."""
        return self._small[name, expert] @ self._stack.right(name, expert)

    def rank(self, name: str) -> int:
        """The most that a merged change may have."""
        return min(self.shapes[name])

    def part(self, name: str, merged: Tensor) -> Part:
        """A merged change from its coordinates."""
        found, (Q, R) = self._stack.frame(name), torch.linalg.qr(merged.T)
        return Part(self._stack.lefts(name), found.X, R.T, torch.eye(len(R)).double(), Q.T)


@final
class Concat:
    """The factors side by side, [w₁s₁B₁ … w_T s_T B_T] [A₁; …; A_T]; the coordinates are which columns are an expert's."""

    def __init__(self, stack: Stack) -> None:
        """Read nothing."""
        self._stack = stack
        self.shapes: dict[str, tuple[int, ...]] = {name: (sum(stack.ranks(name)),) for name in stack.shapes}

    def coordinates(self, name: str, expert: str) -> Tensor:
        """Of one expert's change, in float64."""
        ones = [
            torch.full((r,), float(e == expert)) for e, r in zip(self._stack.adapters, self._stack.ranks(name), strict=True)
        ]
        return torch.cat(ones).double()

    def rank(self, name: str) -> int:
        """Columns of the concatenation, which may be more than the matrix has."""
        return min(*self._stack.shapes[name], *self.shapes[name])

    def part(self, name: str, merged: Tensor) -> Part:
        """A merged change from its coordinates."""
        found = self._stack.frame(name)
        return self._stack.part(name, torch.cat(found.left_K, 1) * merged @ torch.cat(found.right_K))


SPACES: dict[SpaceName, Callable[[Stack], Space]] = {"core": Core, "knots": Knots, "concat": Concat}
