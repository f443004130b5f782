"""One job the fused model must do: its name, head, splits and score.  Fusion, tuning, bench and security all speak of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eutectic.errors import TaskError
from eutectic.record import wilson

SPLITS = ("train", "val", "adapt", "test")


class Arrays:
    """Samples held in memory: ``inputs`` ``[N, …]``, ``labels`` ``[N]``, and what turns stored inputs into the network's."""

    def __init__(self, inputs: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        """Hold by reference.  Raises TaskError if the lengths differ or the labels are not integers."""
        if len(inputs) != len(labels) or labels.ndim != 1 or labels.dtype.is_floating_point:
            raise TaskError(f"{len(inputs)} inputs against labels {tuple(labels.shape)} {labels.dtype}: give one integer each")
        self.inputs, self.labels, self.transform = inputs, labels.long(), transform

    def __len__(self) -> int:
        """How many samples."""
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at ``index`` ``[B]``, transformed, and their labels."""
        inputs = self.inputs[index]
        return inputs if self.transform is None else self.transform(inputs), self.labels[index]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order, the last batch as it comes."""
        for start in range(0, len(self), batch_size):
            yield self.take(torch.arange(start, min(start + batch_size, len(self))))


Batches = Iterable[tuple[Any, Tensor]]
Split = Arrays | tuple[Tensor, Tensor] | Batches


class Pixels(NamedTuple):
    """How a network's inputs ``[…, C, H, W]`` were made of pixels in [0, 1]: (pixels − mean) / std, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, inputs: Tensor) -> Tensor:
        """Inputs → pixels in [0, 1]."""
        return (inputs * _column(self.std, inputs) + _column(self.mean, inputs)).clamp(0, 1)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels → what the network takes."""
        return (pixels - _column(self.mean, pixels)) / _column(self.std, pixels)


class Score(NamedTuple):
    """Accuracy, as a fraction, with its 95 % Wilson interval over ``n`` samples."""

    value: float
    low: float
    high: float
    n: int


class Task:
    """``head(backbone(inputs))`` gives logits ``[B, C]``; the labels of a split are classes ``0 … C − 1``.

    Splits are disjoint: experts learn on ``train``, scalars such as λ are chosen on ``val`` (labelled, seen by no expert),
    methods adapt on the inputs of ``adapt`` without labels, numbers come from ``test``.
    """

    def __init__(
        self,
        name: str,
        head: Callable[[Tensor], Tensor],
        *,
        train: Split | None = None,
        val: Split | None = None,
        adapt: Split | None = None,
        test: Split | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        """Each split is an ``Arrays``, a pair of tensors (inputs, labels), or any iterable of such batches (a DataLoader).

        ``pixels`` says how inputs were made of images, for what works on these; None if they are none.
        """
        self.name, self.head, self.pixels = name, head, pixels
        given = {"train": train, "val": val, "adapt": adapt, "test": test}
        self.splits = {key: _normalised(split, f"{name}.{key}") for key, split in given.items() if split is not None}

    def __repr__(self) -> str:
        """Name and splits."""
        return f"Task({self.name!r}, splits={list(self.splits)})"

    def arrays(self, split: str) -> Arrays:
        """A split held in memory.  Raises TaskError if it is missing or is a stream."""
        found = self._split(split)
        if not isinstance(found, Arrays):
            raise TaskError(f"task {self.name!r}: the split {split!r} is a stream of batches, but tensors in memory are needed")
        return found

    def batches(self, split: str, batch_size: int = 256) -> Iterator[tuple[Any, Tensor]]:
        """The batches of a split; ``batch_size`` counts for splits in memory.  Raises TaskError if it is missing."""
        found = self._split(split)
        return found.batches(batch_size) if isinstance(found, Arrays) else iter(found)

    def _split(self, split: str) -> Arrays | Batches:
        if split not in self.splits:
            raise TaskError(f"task {self.name!r} has no split {split!r}; it has {', '.join(self.splits) or 'none'}")
        return self.splits[split]

    @torch.no_grad()
    def score(self, backbone: nn.Module, split: str = "test", batch_size: int = 256) -> Score:
        """Accuracy of a backbone on a split; the backbone is put in evaluation mode for the while.

        Raises TaskError if the split is missing or empty, or logits and labels do not fit.
        """
        was_training = backbone.training
        backbone.eval()
        hits = n = 0
        for inputs, labels in self.batches(split, batch_size):
            logits = self.head(backbone(inputs))
            if logits.ndim != 2 or len(logits) != len(labels) or labels.max() >= logits.shape[1] or labels.min() < 0:
                raise TaskError(
                    f"task {self.name!r}, split {split!r}: logits {tuple(logits.shape)} do not fit labels "
                    f"{tuple(labels.shape)} in {int(labels.min())}…{int(labels.max())}"
                )
            if not torch.isfinite(logits).all():
                raise TaskError(
                    f"task {self.name!r}, split {split!r}: the network's outputs are not finite; its weights are broken"
                )
            hits += int((logits.argmax(1) == labels).sum())
            n += len(labels)
        backbone.train(was_training)
        if n == 0:
            raise TaskError(f"task {self.name!r}: the split {split!r} is empty")
        return Score(hits / n, *wilson(hits, n), n)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(-1, 1, 1)


def _normalised(split: Split, where: str) -> Arrays | Batches:
    if isinstance(split, Arrays):
        return split
    if isinstance(split, tuple):
        match split:
            case (Tensor() as inputs, Tensor() as labels):
                return Arrays(inputs, labels)
        raise TaskError(f"{where}: a pair of tensors (inputs, labels) is expected")
    if isinstance(split, Iterator):
        raise TaskError(f"{where}: an iterator can be read only once; give a DataLoader, or tensors")
    return split
