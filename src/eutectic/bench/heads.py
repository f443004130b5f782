"""Few-shot prototype heads: made once from the base model, then frozen.  They play the part of CLIP's zero-shot heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import TaskError


class PrototypeHead(nn.Module):
    """Logits = scale · cosine(standardised features, class prototypes); nothing in it is trained.

    The prototypes are class means of the base model's features of a few training images, as in Snell et al.,
    "Prototypical networks", NeurIPS 2017, arXiv:1703.05175; differs in the standardisation and the cosine.
    """

    def __init__(self, mean: Tensor, std: Tensor, prototypes: Tensor, scale: float) -> None:
        """``mean``, ``std`` ``[D]`` and unit ``prototypes`` ``[C, D]``."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, features: Tensor) -> Tensor:
        """``[B, D]`` → ``[B, C]``."""
        directions = F.normalize((features - self.mean) / self.std, dim=-1)
        return self.scale * F.linear(directions, self.prototypes)


def prototype_head(features: Tensor, labels: Tensor, classes: int, scale: float) -> PrototypeHead:
    """Fit a head on the base model's ``features`` ``[N, D]`` of a few labelled samples.

    Raises TaskError naming the class that has no sample.
    """
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise TaskError(f"class {int(counts.argmin())} of {classes} has no sample to make a prototype from")
    mean, std = features.mean(0), features.std(0).clamp(min=1e-5)
    directions = F.normalize((features - mean) / std, dim=-1)
    prototypes = torch.stack([directions[labels == c].mean(0) for c in range(classes)])
    return PrototypeHead(mean, std, F.normalize(prototypes, dim=-1), scale)


def few_shot(labels: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Indices of ``shots`` random samples a class (fewer where a class has fewer), in class order."""
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == c][:shots] for c in range(int(labels.max()) + 1)])
