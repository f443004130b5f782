"""Low-rank adapters on linear layers while they are trained; what is saved is a PEFT folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.save import save_tensors


class LoraLinear(nn.Module):
    """y = W x + b + (α / r) B A x with W, b frozen, A ``[r, in]`` random and B ``[out, r]`` zero at the start.

    Source: Hu et al., "LoRA", ICLR 2022, arXiv:2106.09685.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Wrap ``linear``; A is uniform as PEFT's, in ±1/√in."""
        super().__init__()
        self.linear = linear.requires_grad_(False)
        bound = 1 / math.sqrt(linear.in_features)
        self.A = nn.Parameter((torch.rand(rank, linear.in_features, generator=generator) * 2 - 1) * bound)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` → ``[…, out]``."""
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B) * self.scaling


def attach(backbone: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze the backbone and give every linear layer an adapter, in place."""
    backbone.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(parent, LoraLinear):
                parent.add_module(name, LoraLinear(child, rank, alpha, generator))


def adapters(backbone: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The attached adapters by the names of the layers that they wrap."""
    return ((name, module) for name, module in backbone.named_modules() if isinstance(module, LoraLinear))


def save_adapter(backbone: nn.Module, folder: Path, base: str, dtype: torch.dtype) -> None:
    """Write the attached adapters into an existing folder, in PEFT's layout; ``base`` is the path its reader looks for."""
    tensors: dict[str, Tensor] = {}
    attached = dict(adapters(backbone))
    for name, adapter in attached.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.B.detach().to(dtype)
    rank = next(iter(attached.values())).A.shape[0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": next(iter(attached.values())).scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(attached),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_tensors(Memory(tensors), folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
