"""A vision transformer whose state dict is a Hugging Face ``Dinov2Model``'s.

It exists so that the suites `mini` and `dino` need neither transformers nor torchvision; a test holds its
features against ``transformers.Dinov2Model`` on the same weights.  Source: Oquab et al., "DINOv2: Learning
Robust Visual Features without Supervision", 2023, arXiv:2304.07193; ViT: Dosovitskiy et al., 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({n: nn.Linear(width, width) for n in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x_BNC: Tensor) -> Tensor:
        q, k, v = (self.attention[n](x_BNC).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.output["dense"](mixed)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = _Attention(width, heads)
        self.layer_scale1, self.layer_scale2 = _Scale(width), _Scale(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, width * mlp_ratio), "fc2": nn.Linear(width * mlp_ratio, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class _Embeddings(nn.Module):
    def __init__(self, width: int, patch: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # unused here; kept so that names match the folder's
        self.position_embeddings = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, patch)})

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](pixels_BCHW)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + resized_positions(self.position_embeddings, patches.shape[-2], patches.shape[-1])


def resized_positions(positions: Tensor, rows: int, cols: int) -> Tensor:
    """Position embeddings ``[1, 1 + side², width]`` for another grid of patches, bicubically, as Dinov2Model does it."""
    side = math.isqrt(positions.shape[1] - 1)
    if (rows, cols) == (side, side):
        return positions
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, cols), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class ViT(nn.Module):
    """Pixels ``[B, 3, H, W]`` → features ``[B, width]``, after the last layer norm.

    ``pooling`` "cls" takes the class token, "mean" the mean of the patch tokens (better when the last blocks are left out).
    """

    def __init__(self, config: Mapping[str, Any], pooling: Literal["cls", "mean"] = "cls") -> None:
        """Build an untrained network from the fields of a Dinov2 ``config.json``."""
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.pooling = pooling
        self.embeddings = _Embeddings(width, config["patch_size"], config["image_size"] // config["patch_size"])
        blocks = (
            _Block(width, config["num_attention_heads"], config["mlp_ratio"], eps) for _ in range(config["num_hidden_layers"])
        )
        self.encoder = nn.ModuleDict({"layer": nn.Sequential(*blocks)})
        self.layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """See the class."""
        x = self.encoder["layer"](self.embeddings(pixels_BCHW))
        return self.layernorm(x[:, 0]) if self.pooling == "cls" else self.layernorm(x[:, 1:]).mean(1)
