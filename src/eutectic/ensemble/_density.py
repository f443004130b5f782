"""What a density model is, and in which space: p(x) of a party's own data, by which others judge who knows an input.

B = samples, d = coordinates of the space.  Log-densities of two parties can be compared only if both are of one space.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from eutectic.ensemble._networks import Described
from eutectic.errors import CheckpointError, TaskError
from eutectic.methods._method import Count


class Density(nn.Module, ABC):
    """A normalised density over ``[d]``, whose tensors are its parameters."""

    @abstractmethod
    def log_prob(self, z_Bd: Tensor) -> Tensor:
        """Log p(z), ``[B]``, in nats."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws ``[n, d]``."""


class Flat(Described):
    """Inputs as they are, flattened."""

    kind: Literal["flat"] = "flat"

    def dims(self, shape: tuple[int, ...]) -> int:
        """How many coordinates inputs of this shape have."""
        return math.prod(shape)

    def into(self, inputs: Tensor) -> Tensor:
        """``[B, *shape]`` → ``[B, d]``."""
        return inputs.flatten(1)

    def back(self, z_Bd: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``[B, d]`` → ``[B, *shape]``."""
        return z_Bd.view(-1, *shape)


class Cosines(Described):
    """The ``size`` × ``size`` lowest frequencies of a discrete cosine transform (DCT-II, orthonormal) of each channel.

    No data decide what it is, so parties share it without sharing anything; with all frequencies it only turns the pixels.
    """

    kind: Literal["cosines"] = "cosines"
    size: Count = 12

    def dims(self, shape: tuple[int, ...]) -> int:
        """How many coordinates inputs of this shape have.  Raises CheckpointError for inputs that are no such images."""
        if len(shape) != 3 or min(shape[1:]) < self.size:
            raise CheckpointError(
                f"{self.size} frequencies a side need images [C, H, W] at least so large, not inputs {list(shape)}"
            )
        return shape[0] * self.size**2

    def into(self, inputs: Tensor) -> Tensor:
        """``[B, C, H, W]`` → ``[B, d]``."""
        down, right = (_cosines(n, self.size).to(inputs) for n in inputs.shape[2:])
        return (down @ inputs @ right.T).flatten(1)

    def back(self, z_Bd: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``[B, d]`` → the smooth images ``[B, C, H, W]`` that have these frequencies and no others."""
        down, right = (_cosines(n, self.size).to(z_Bd) for n in shape[1:])
        return down.T @ z_Bd.view(-1, shape[0], self.size, self.size) @ right


@functools.cache
def _cosines(n: int, k: int) -> Tensor:
    """The first k rows of the orthonormal DCT-II of n points, ``[k, n]``."""
    points, frequencies = torch.arange(n).double() + 0.5, torch.arange(k).double()[:, None]
    rows = torch.cos(math.pi * frequencies * points / n) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.float()


Space = Annotated[Flat | Cosines, Field(discriminator="kind")]


def require_samples(z: Tensor, labels: Tensor) -> None:
    """Refuse what no density can be fitted to: no samples, none of a class, or coordinates that are not finite: TaskError."""
    counts = labels.bincount()
    if len(z) < 2 or len(z) != len(labels) or (counts == 0).any():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise TaskError(
            f"a density of {len(z)} samples with {len(labels)} labels, none of classes {empty}: leave these classes out"
        )
    if not torch.isfinite(z).all():
        raise TaskError("a density of samples that are not finite: clean the data first")
