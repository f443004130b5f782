"""Screens that need no data: how an expert's task vector τ = θᵢ − θ₀ differs from those of the others.

- *size*: ‖τᵢ‖ over the median of all; amplified backdoors (LoBAM, Merge-Hijacking) are large.
- *tensor*: the largest such ratio in a single tensor; a change that sits in few layers.
- *cosine*: the largest |cos(τᵢ, τⱼ)|; copies, and backdoors that several experts share.
- *concentration*: how much of ‖τᵢ‖² lies in the first singular direction, in the mean over matrices; a backdoor is often thin.

Each is compared with the other experts by a robust z-score, (x − median) / (1.4826 · MAD).  What is trained with an honest
learning rate and no more steps than others, BadMerging for one, none of these see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint
from eutectic.fusion._tensors import differences

#: fewer experts have no spread to speak of
LEAST_EXPERTS = 4
#: from here on a value stands out: one normal value in five hundred does, and of few experts' more
STANDS_OUT = 3.0
#: what a z-score is never smaller a spread than, as a share of the median: equal values are not told apart by rounding
LEAST_SPREAD = 0.05
#: tensors with less of all change than this are not looked at on their own
LEAST_SHARE = 1e-3


class Screen(NamedTuple):
    """One number of one expert; ``z`` is None where too few experts can be compared, ``where`` names a tensor or an expert."""

    signal: str
    value: float
    z: float | None
    where: str = ""

    @property
    def stands_out(self) -> bool:
        """Whether it is far above the others'."""
        return self.z is not None and self.z > STANDS_OUT


class _Sums(NamedTuple):
    """Σ over tensors: products ``[K, K]`` in float64, norms² of each tensor ``[K]``, and first singular values' shares."""

    products: Tensor
    squares: dict[str, Tensor]
    shares: list[Tensor]


def screens(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> dict[str, list[Screen]]:
    """Expert → its numbers; reads every tensor once.  Raises NonFiniteError naming an expert and tensor."""
    names = list(experts)
    sums = _summed(base, experts)
    norms = sums.products.diagonal().clamp(min=0).sqrt()
    found: dict[str, list[Screen]] = {name: [] for name in names}
    sizes = norms / norms.median().clamp(min=1e-30)
    ratios, tensors = _largest_ratios(sums.squares, float(norms.square().sum()), len(names))
    cosine = sums.products / (norms[:, None] * norms).clamp(min=1e-30)
    closest = cosine.abs().fill_diagonal_(0).max(1)
    shares = torch.stack(sums.shares).mean(0) if sums.shares else torch.zeros(len(names), dtype=torch.float64)
    for at, name in enumerate(names):
        if not norms[at]:
            found[name].append(Screen("is the base itself", 0.0, None))
            continue
        found[name] += [
            Screen("size", float(sizes[at]), _z(sizes, at)),
            Screen("tensor", float(ratios[at]), _z(ratios, at), tensors[at]),
            Screen("concentration", float(shares[at]), _z(shares, at)),
        ]
        if len(names) > 1:
            found[name].append(
                Screen("cosine", float(closest.values[at]), _z(closest.values, at), names[int(closest.indices[at])])
            )
    return found


def _summed(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> _Sums:
    k = len(experts)
    sums = _Sums(torch.zeros(k, k, dtype=torch.float64), {}, [])
    for name, spec in base.specs.items():
        if not spec.dtype.is_floating_point:
            continue
        vectors = differences(base, experts, name)
        flat = vectors.flatten(1)
        products = (flat @ flat.T).double()
        sums.products.add_(products)
        sums.squares[name] = products.diagonal().clamp(min=0)
        if len(spec.shape) == 2 and min(spec.shape) > 1 and products.any():
            sums.shares.append(torch.stack([_first_share(vector) for vector in vectors]))
    return sums


def _first_share(matrix: Tensor) -> Tensor:
    """σ₁² / Σσ², by the power method on the smaller Gram matrix; 0 of a zero matrix."""
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    total = gram.trace().double()
    if not total:
        return total
    direction = gram[:, gram.diagonal().argmax()]
    for _ in range(30):
        direction = gram @ (direction / direction.norm())
    return direction.norm().double() / total


def _largest_ratios(squares: Mapping[str, Tensor], total: float, k: int) -> tuple[Tensor, list[str]]:
    best, where = torch.zeros(k, dtype=torch.float64), [""] * k
    for name, square in squares.items():
        middle = float(square.sqrt().median())
        if float(square.sum()) < LEAST_SHARE * total or not middle:
            continue
        for at, ratio in enumerate((square.sqrt() / middle).tolist()):
            if ratio > best[at]:
                best[at], where[at] = ratio, name
    return best, where


def _z(values: Tensor, at: int) -> float | None:
    return robust_z(values.tolist(), at) if len(values) >= LEAST_EXPERTS else None


def robust_z(values: list[float], at: int) -> float:
    """How far a value is above the others, in their robust standard deviations."""
    others = torch.tensor([value for i, value in enumerate(values) if i != at], dtype=torch.float64)
    middle = float(others.median())
    spread = 1.4826 * float((others - middle).abs().median())
    return (values[at] - middle) / max(spread, LEAST_SPREAD * abs(middle), math.ulp(1.0))
