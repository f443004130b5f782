"""Low-rank adapters on linear layers while they are trained; what is saved is a PEFT folder.

*Linearised, layer by layer.*  Each layer h(x; A, B) = W x + b + s B A x is, to first order around its A₀ and B₀ = 0,

    h(x; A₀, 0) + ∂h/∂A · (A − A₀) + ∂h/∂B · B  =  W x + b + s (0 · (A − A₀) + B A₀) x  =  W x + b + s B A₀ x

A is gone: its derivative has B₀ = 0 for a factor.  So L-LoRA (Tang et al., ICLR 2024, arXiv:2310.04742), whose code linearises
each layer by forward-mode differentiation, *is* LoRA whose A stays as it was drawn, exactly and without a product with a
Jacobian: ``frozen_a``.  Then s Σ λₖ Bₖ A₀ = Σ λₖ ΔWₖ for experts of one seed: merging Bs is merging weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.peft import PREFIX
from eutectic.errors import LayoutError, ParameterError
from eutectic.merge.adapter_folder import write_adapter


class LoraLinear(nn.Module):
    """y = W x + b + s B A x with W, b frozen, A ``[r, in]`` random and B ``[out, r]`` zero at the start; s = α / r.

    Source: Hu et al., "LoRA", ICLR 2022, arXiv:2106.09685.  With ``rslora`` s = α / √r, of Kalajdzievski, "A rank stabilization
    scaling factor", 2023, arXiv:2312.03732.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        *,
        rslora: bool = False,
        frozen_a: bool = False,
    ) -> None:
        """Wrap ``linear``; A is uniform as PEFT's, in ±1/√in."""
        super().__init__()
        self.linear = linear.requires_grad_(False)
        bound = 1 / math.sqrt(linear.in_features)
        A = (torch.rand(rank, linear.in_features, generator=generator) * 2 - 1) * bound
        self.A = nn.Parameter(A.to(linear.weight), requires_grad=not frozen_a)
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.alpha, self.rslora = alpha, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` → ``[…, out]``."""
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B) * self.scaling


def attach(backbone: nn.Module, rank: int, alpha: float, seed: int, *, rslora: bool = False, frozen_a: bool = False) -> None:
    """Freeze the backbone and give every linear layer an adapter, in place; one seed gives one A, whatever the task.

    Raises LayoutError if there is no linear layer, ParameterError naming the layer for a rank larger than its matrix.
    """
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)}
    if not layers:
        raise LayoutError(f"{type(backbone).__name__} has no linear layer to give an adapter; tune all weights (kind: full)")
    for name, layer in layers.items():
        if rank > min(layer.weight.shape):
            raise ParameterError(f"rank = {rank}: the matrix of {name!r} is {list(layer.weight.shape)}, so give less")
    backbone.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(parent, LoraLinear):
                parent.add_module(name, LoraLinear(child, rank, alpha, generator, rslora=rslora, frozen_a=frozen_a))


def adapters(backbone: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The attached adapters by the names that the layers they wrap have in the backbone's state dict."""
    known = {id(tensor): name for name, tensor in backbone.state_dict(keep_vars=True).items()}
    for module in backbone.modules():
        if isinstance(module, LoraLinear):
            yield known[id(module.linear.weight)].removesuffix(".linear.weight"), module


@torch.no_grad()
def fold(backbone: nn.Module) -> None:
    """Replace every adapted layer by a linear one with W + s B A, in place."""
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                child.linear.weight += child.scaling * child.B @ child.A
                parent.add_module(name, child.linear)


def save_adapter(backbone: nn.Module, folder: Path, base: str, dtype: torch.dtype) -> dict[str, Any]:
    """Write the attached adapters into an existing folder, in PEFT's layout; what its ``eutectic.json`` may say of them.

    ``base`` is the path that its reader looks for, as seen from the folder.
    """
    tensors: dict[str, Tensor] = {}
    attached = dict(adapters(backbone))
    for name, adapter in attached.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.A.detach().to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.B.detach().to(dtype)
    some = next(iter(attached.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": some.A.shape[0],
        "lora_alpha": some.alpha,
        **({"use_rslora": True} if some.rslora else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(attached),
    }
    return write_adapter(Memory(tensors), config, folder)
