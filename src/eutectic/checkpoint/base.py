"""The one seam for tensors: a read-only, lazy, thread-safe checkpoint."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.errors import CheckpointError, did_you_mean

#: ``map``, or one that works on several items at a time and still gives the results in order
Spread = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Span(NamedTuple):
    """Elements ``start:stop`` of the flattened tensor ``name``."""

    name: str
    start: int
    stop: int


class Thin(NamedTuple):
    """A matrix as start + left · right, of ``[m, n]``, ``[m, r]`` and ``[r, n]``."""

    start: Tensor
    left: Tensor
    right: Tensor


class Turn:
    """A lock that its holder may take again; a copy made by pickling has one of its own."""

    def __init__(self) -> None:
        """Free."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


class Checkpoint(ABC):
    """Named tensors that are read on demand.

    Implementations give ``specs`` and ``_read`` (a flat range of one tensor's elements: the finest grain, so
    that a chunk can fit any memory budget however long a tensor's rows are).  Reads may come from many threads, and by
    pickling from other machines: files go by their absolute path, and what was measured goes along.
    """

    #: where it comes from, for error messages and provenance
    origin: str = "memory"
    #: the files that hold its bytes, the weights' own first
    files: tuple[Path, ...] = ()
    #: whether equal files mean equal contents; not so for views, whose own settings are in no file
    durable: bool = False

    @property
    @abstractmethod
    def specs(self) -> Layout:
        """Name → shape and dtype of every tensor; costs no tensor read."""

    @abstractmethod
    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` of the row-major flattened tensor, as ``[stop - start]``; arguments are valid."""

    def spec(self, name: str) -> TensorSpec:
        """The spec of one tensor.  Raises CheckpointError, with the nearest name, if there is none."""
        try:
            return self.specs[name]
        except KeyError:
            raise CheckpointError(f"{self.origin}: no tensor {name!r}.{did_you_mean(name, self.specs)}") from None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or the given rows (a contiguous slice along its first axis).

        Do not write into the result: it may share memory with the checkpoint.
        Raises CheckpointError for an unknown name or a slice with a step.
        """
        spec = self.spec(name)
        if rows is None:
            return self._read(name, 0, spec.numel).view(spec.shape)
        if not spec.shape or rows.step not in (None, 1):
            raise CheckpointError(f"{self.origin}: rows of {name!r} {spec} must be a slice of step 1 along its first axis")
        first, last, _ = rows.indices(spec.shape[0])
        last = max(first, last)
        row = TensorSpec(spec.shape[1:], spec.dtype).numel
        return self._read(name, first * row, last * row).view(last - first, *spec.shape[1:])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` of the flattened tensor, as ``[stop - start]``.  Raises CheckpointError if outside it."""
        if not 0 <= start <= stop <= self.spec(name).numel:
            raise CheckpointError(f"{self.origin}: {name!r} has {self.spec(name).numel} elements, not {start}:{stop}")
        return self._read(name, start, stop)

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """Parts of tensors of one dtype, end to end, as ``[n]``; the arguments are valid.

        What is many small tensors to a model can be one read, and one computation.
        """
        flats = [self._read(*span) for span in spans]
        return flats[0] if len(flats) == 1 else torch.cat(flats)

    def thin(self, name: str) -> Thin | None:
        """A matrix, before it is rounded, as another and the product of two thin ones, where it is made so; None elsewhere."""
        return None

    def grain(self, name: str) -> int:
        """How many elements of a tensor are best read together: fewer would cost as much."""
        return 1

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:  # noqa: B027 — most need nothing
        """Do once what reading these tensors needs, on as many threads as ``spread`` has.  Nothing by default.

        Without names it is what reading any tensor needs: measurements over the whole model.
        """

    def need_bytes(self, name: str, n: int) -> int:
        """An upper bound of the memory that reading n elements of a tensor takes, the result included."""
        return 2 * n * self.specs[name].dtype.itemsize

    def close(self) -> None:  # noqa: B027 — most checkpoints hold nothing open
        """Release files; reading afterwards is an error.  Nothing to do by default."""

    def __enter__(self) -> Checkpoint:
        """Use as a context manager to close it at the end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()


class Memory(Checkpoint):
    """A state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str = "memory") -> None:
        """Hold ``tensors`` by reference.  Raises CheckpointError if a value is not a strided tensor."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                raise CheckpointError(f"{origin}: {name!r} is not a dense tensor but {type(tensor).__name__}")
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self.origin = origin

    @property
    def specs(self) -> Layout:
        """Name → shape and dtype, in the dict's order."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].reshape(-1)[start:stop]


def thin_over(base: Checkpoint, changed: Checkpoint, name: str) -> Thin | None:
    """What ``changed`` adds to the base's matrix as two thin ones, if it is made so of the very same matrix; None if not."""
    found = changed.thin(name)
    if found is None:
        return None
    start = base.read(name)
    return found if found.start.dtype == start.dtype and torch.equal(found.start, start) else None


def live(module: nn.Module) -> Memory:
    """A module's current state dict as a checkpoint: it shares memory, so it follows training."""
    return Memory(module.state_dict(), origin=type(module).__name__)


def element_bytes(flat: Tensor) -> memoryview:
    """The bytes of a one-dimensional tensor, without a copy where it is contiguous."""
    # one element counts as contiguous whatever its stride, but cannot be viewed as bytes unless that is 1
    return flat.contiguous().as_strided((len(flat),), (1,)).view(torch.uint8).numpy().data
