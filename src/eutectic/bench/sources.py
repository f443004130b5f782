"""Raw data sets on disk → disjoint splits.

Images: ``NAME.npz`` with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (uint8 NHWC, one or three
channels) and ``classes``.  Text: ``NAME.jsonl.gz``, first line ``{"classes": […]}``, then ``{"split", "text", "label"}``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eutectic.errors import TaskError


class Raw(NamedTuple):
    """A data set as published: inputs (images, or strings as objects), labels ``[N]``, and class names."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: list[str]


def load_raw(folder: Path, name: str) -> Raw:
    """Read ``NAME.npz`` or ``NAME.jsonl.gz``.  Raises TaskError naming the file and what it lacks; pickles are refused."""
    images, text = folder / f"{name}.npz", folder / f"{name}.jsonl.gz"
    try:
        if images.exists():
            with np.load(images, allow_pickle=False) as data:
                splits = [(data[f"{split}_images"], data[f"{split}_labels"].astype(np.int64)) for split in ("train", "test")]
                return Raw(splits[0], splits[1], [str(c) for c in data["classes"]])
        if text.exists():
            return _load_text(text)
    except (KeyError, ValueError, OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{images if images.exists() else text}: not a data set of this layout: {error}") from error
    raise TaskError(f"{folder}: neither {images.name} nor {text.name} is there; name the data folder with --data")


def _load_text(path: Path) -> Raw:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        classes = [str(c) for c in json.loads(file.readline())["classes"]]
        rows = [json.loads(line) for line in file]
    parts = []
    for split in ("train", "test"):
        chosen = [row for row in rows if row["split"] == split]
        parts.append((np.array([row["text"] for row in chosen], object), np.array([row["label"] for row in chosen], np.int64)))
    return Raw(parts[0], parts[1], classes)


def keep_classes(raw: Raw, names: Sequence[str]) -> Raw:
    """Only the named classes, renumbered in that order.  Raises TaskError for a name the data set lacks."""
    missing = [name for name in names if name not in raw.classes]
    if missing:
        raise TaskError(f"no class {missing[0]!r} among {raw.classes}")
    renumber = np.full(len(raw.classes), -1)
    renumber[[raw.classes.index(name) for name in names]] = np.arange(len(names))

    def pick(part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        labels = renumber[part[1]]
        return part[0][labels >= 0], labels[labels >= 0]

    return Raw(pick(raw.train), pick(raw.test), list(names))


def split(raw: Raw, sizes: Mapping[str, int], seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Disjoint ``train``, ``val``, ``adapt`` (all from the published training part) and ``test``, at most so many samples each.

    An input that occurs twice is kept once, and one that is in the published test part is dropped from the training part.
    ``val`` and ``adapt`` are served first; ``train`` gets what is left, up to its size.
    """
    random = np.random.default_rng(seed)
    seen: set[bytes] = set()
    test = _fresh(raw.test, random, seen)
    train = _fresh(raw.train, random, seen)
    parts = {"test": tuple(part[: sizes["test"]] for part in test)}
    start = 0
    for name in ("val", "adapt", "train"):
        stop = start + sizes[name]
        parts[name] = tuple(part[start:stop] for part in train)
        start = stop
    return {name: (inputs, labels) for name, (inputs, labels) in parts.items()}


def _fresh(part: tuple[np.ndarray, np.ndarray], random: np.random.Generator, seen: set[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The part in random order without inputs seen before; adds to ``seen``."""
    kept = []
    for i in random.permutation(len(part[1])):
        key = part[0][i].tobytes()
        if key not in seen:
            seen.add(key)
            kept.append(i)
    return part[0][kept], part[1][kept]
