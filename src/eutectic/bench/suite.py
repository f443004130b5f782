"""A suite: one base, its experts, and the tasks they were made for, in one folder.

suite.json           name, tasks with their classes, how it was made
data.npz             TASK.SPLIT.inputs, TASK.SPLIT.labels
heads.safetensors    TASK.mean, TASK.std, TASK.prototypes, TASK.scale
base/                a Hugging Face folder
experts/TASK/        a Hugging Face folder, or a PEFT folder over ``base``
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eutectic.bench.backbones import backbone
from eutectic.bench.heads import PrototypeHead
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.checkpoint.views import Cast
from eutectic.errors import TaskError, UnknownNameError, did_you_mean
from eutectic.fusion._routed import Description
from eutectic.task import SPLITS, Arrays, Pixels, Task

PIXELS = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, as DINOv2 was trained


class Suite:
    """A suite read from its folder; nothing but ``suite.json`` is read before it is asked for."""

    def __init__(self, folder: Path, experts: Path | None = None) -> None:
        """Open; ``experts`` is another folder of experts by task than its own.  Raises TaskError if there is no suite."""
        self.folder, self.experts_folder = folder, experts or folder / "experts"
        try:
            self.info: dict[str, Any] = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TaskError(f"{folder}: no suite is here (suite.json: {error}); build it with `eutectic zoo build`") from None
        if not isinstance(self.info, dict) or not {"name", "side", "tasks", "settings"} <= self.info.keys():
            raise TaskError(f"{folder / 'suite.json'}: lacks a name, tasks or settings; build the suite anew")
        self.name: str = self.info["name"]
        self.classes: Mapping[str, list[str]] = self.info["tasks"]

    @functools.cached_property
    def base(self) -> Checkpoint:
        """θ₀, as float32."""
        return Cast(open_folder(self.folder / "base"), torch.float32)

    @functools.cache  # noqa: B019 — a handful of suites live as long as the process
    def expert(self, task: str) -> Checkpoint:
        """The expert of one task, as float32; adapters are expanded as they are read."""
        self._require(task)
        folder = self.experts_folder / task
        if (folder / "adapter_config.json").exists():
            return open_lora(folder, self.base)
        return Cast(open_folder(folder), torch.float32)

    def experts(self, names: list[str] | None = None) -> dict[str, Checkpoint]:
        """Task → expert, all or those named."""
        return {name: self.expert(name) for name in (self.classes if names is None else names)}

    @property
    def there(self) -> list[str]:
        """The tasks whose experts are in their folder: of a finished suite all, of another folder of experts some."""
        return [name for name in self.classes if (self.experts_folder / name).exists()]

    @functools.cached_property
    def tasks(self) -> list[Task]:
        """All tasks with their heads and splits."""
        return [self.task(name) for name in self.classes]

    @functools.cache  # noqa: B019
    def task(self, name: str) -> Task:
        """One task.  Raises UnknownNameError, TaskError."""
        self._require(name)
        pixels = PIXELS if self.info["side"] else None
        return Task(name, self._head(name).eval(), **{split: self.arrays(name, split) for split in SPLITS}, pixels=pixels)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """The content hashes of ``base`` and, by task, of the experts that are there; reads all of them once."""
        weights = {"base": self.base} | self.experts(self.there)
        return {name: fingerprint(checkpoint) for name, checkpoint in weights.items()}

    def backbone(
        self, weights: Checkpoint | None = None, layers: Mapping[str, Description] = MappingProxyType({})
    ) -> nn.Module:
        """The network in evaluation mode with the given weights, θ₀ by default, and the given layers routed."""
        return backbone(self.folder / "base" / "config.json", weights or self.base, self.info["settings"]["pooling"], layers)

    def _require(self, task: str) -> None:
        if task not in self.classes:
            raise UnknownNameError(f"suite {self.name!r} has no task {task!r}.{did_you_mean(task, self.classes)}")

    def _head(self, task: str) -> PrototypeHead:
        with SafetensorsFile(self.folder / "heads.safetensors") as heads:
            mean, std, prototypes, scale = (heads.read(f"{task}.{part}") for part in ("mean", "std", "prototypes", "scale"))
        return PrototypeHead(mean, std, prototypes, scale.item())

    @functools.cache  # noqa: B019
    def arrays(self, task: str, split: str) -> Arrays:
        """One split.  Raises TaskError naming the file."""
        path = self.folder / "data.npz"
        try:
            with np.load(path, allow_pickle=False) as data:
                inputs, labels = data[f"{task}.{split}.inputs"], data[f"{task}.{split}.labels"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise TaskError(f"{path}: {task}.{split} cannot be read: {error}") from None
        return _arrays(inputs, labels, self.info["side"])


def _arrays(inputs: np.ndarray, labels: np.ndarray, side: int | None) -> Arrays:
    """Stored images or token ids as a split; images come out ``[B, 3, side, side]``, normalised."""
    transform = functools.partial(to_pixels, side=side) if side else None
    tensor = torch.from_numpy(inputs)
    return Arrays(tensor if side else tensor.long(), torch.from_numpy(labels.astype(np.int64)), transform)


def to_pixels(images_BHWC: Tensor, side: int) -> Tensor:
    """uint8 images of one or three channels → normalised float32 ``[B, 3, side, side]``, resized bilinearly."""
    pixels = images_BHWC.permute(0, 3, 1, 2).float() / 255
    pixels = nn.functional.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return PIXELS.inputs(pixels.expand(-1, 3, -1, -1))
