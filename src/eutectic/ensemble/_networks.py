"""Classifiers that are described by plain data, so that a folder needs no code and no pickle to be a network again."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import CheckpointError, MissingDependencyError
from eutectic.methods._method import Count, Fraction, Positive

Odd = Annotated[int, Field(ge=1, le=15, multiple_of=2 * 0 + 1)]


class Described(pydantic.BaseModel):
    """Plain data that describes something; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MLP(Described):
    """Linear layers of these widths, with ReLU."""

    architecture: Literal["mlp"] = "mlp"
    widths: tuple[Count, ...] = (64, 64)

    def build(self, shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Inputs ``[B, *shape]`` → logits ``[B, outputs]``."""
        sizes = [math.prod(shape), *self.widths]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class CNN(Described):
    """Blocks of a 3 × 3 convolution, 2 × 2 pooling, batch norm and ReLU, then a hidden layer."""

    architecture: Literal["cnn"] = "cnn"
    channels: tuple[Count, ...] = (32, 64)
    hidden: Count = 128
    dropout: Fraction = 0.25

    def build(self, shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Images ``[B, *shape]`` → logits ``[B, outputs]``."""
        depth, height, width = _image(shape)
        layers: list[nn.Module] = []
        for channels in self.channels:
            layers += [nn.Conv2d(depth, channels, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(channels), nn.ReLU()]
            depth, height, width = channels, height // 2, width // 2
        if not height or not width:
            raise CheckpointError(f"{len(self.channels)} halvings leave nothing of images {shape}: give fewer `channels`")
        layers += [nn.Flatten(), nn.Dropout(self.dropout), nn.Linear(depth * height * width, self.hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.Dropout(self.dropout), nn.Linear(self.hidden, outputs))


class ResNet(Described):
    """Residual blocks of two 3 × 3 convolutions, the image halved from stage to stage; after He et al., CVPR 2016."""

    architecture: Literal["resnet"] = "resnet"
    channels: tuple[Count, ...] = (16, 32, 64)
    blocks: Count = 1

    def build(self, shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Images ``[B, *shape]`` → logits ``[B, outputs]``."""
        depth, _, _ = _image(shape)
        first = self.channels[0]
        layers: list[nn.Module] = [nn.Conv2d(depth, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
        depth = first
        for stage, channels in enumerate(self.channels):
            for block in range(self.blocks):
                layers.append(_Residual(depth, channels, 2 if stage and not block else 1))
                depth = channels
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(depth, outputs))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Transformers(Described):
    """An image classifier of transformers, whose Hugging Face folder is the party's ``classifier``; no code comes with it."""

    architecture: Literal["transformers"] = "transformers"


Architecture = Annotated[MLP | CNN | ResNet | Transformers, Field(discriminator="architecture")]


class Normalisation(Described):
    """What a classifier does to its inputs first: (x − mean) / std by channel, and images resized to ``size``."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[Positive, ...] = (1.0,)
    size: tuple[Count, Count] | None = None


class Classifier(nn.Module):
    """A party's network with its normalisation: inputs in the common form ``[B, *shape]`` → logits ``[B, c]``."""

    def __init__(self, network: nn.Module, normalisation: Normalisation, shape: tuple[int, ...]) -> None:
        """Wrap.  Raises CheckpointError for a normalisation of another number of channels."""
        super().__init__()
        self.network, self.normalisation = network, normalisation
        counts = {1, shape[0]}
        if {len(normalisation.mean), len(normalisation.std)} - counts or (normalisation.size and len(shape) != 3):
            raise CheckpointError(f"the normalisation {normalisation.model_dump()} does not fit inputs {list(shape)}")
        self._axes = (-1, *(1,) * (len(shape) - 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        how = self.normalisation
        if how.size is not None:
            inputs = F.interpolate(inputs, how.size, mode="bilinear", align_corners=False, antialias=True)
        x = (inputs - inputs.new_tensor(how.mean).view(self._axes)) / inputs.new_tensor(how.std).view(self._axes)
        found = self.network(x)
        return found if isinstance(found, Tensor) else found.logits


def from_transformers(folder: Path) -> nn.Module:
    """The image classifier in a Hugging Face folder, of safetensors.  Raises CheckpointError, MissingDependencyError."""
    try:
        from transformers import AutoModelForImageClassification
    except ImportError:
        raise MissingDependencyError(f"{folder}: is a model of transformers: pip install 'eutectic[text]'") from None
    try:
        return AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{folder}: transformers makes no image classifier of it: {error}") from None


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise CheckpointError(f"a convolutional network needs images [C, H, W], not inputs {list(shape)}")
    return shape[0], shape[1], shape[2]


def described(kind: Any, data: Any, origin: str) -> Any:
    """Plain data as a description of this kind.  Raises CheckpointError naming the origin and the key."""
    try:
        return pydantic.TypeAdapter(kind).validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{origin}: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}") from None
