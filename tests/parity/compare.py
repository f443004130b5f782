"""How far apart two results are, in steps of bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

#: what cancels to less than this share of the tensor's largest entry is compared at that size: float32 carries no more
FLOOR = 2.0**-14


def step(size: Tensor) -> Tensor:
    """The distance between neighbouring bfloat16 numbers of a size: eight significant bits."""
    return torch.exp2(torch.floor(torch.log2(size)) - 7)


def steps(ours: Tensor, theirs: Tensor) -> Tensor:
    """|ours − theirs|, entry by entry, in steps of bfloat16 at the larger of the two; infinite where one is not finite."""
    a, b = ours.double(), theirs.double()
    largest = b.abs().max().clamp(min=1e-30)
    size = torch.maximum(a.abs(), b.abs()).clamp(min=float(FLOOR * largest))
    return torch.nan_to_num((a - b).abs() / step(size), nan=torch.inf)


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest distance of two models with the same names, shapes and dtypes, and where it is."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    found = []
    for name, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype), name
        found.append((float(steps(tensor, theirs[name]).max()), name))
    return max(found)
