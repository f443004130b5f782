"""Means on the sphere, from inner products alone.

Every vector that such an iteration meets is a combination of the K experts, so it runs on K coefficients and the K × K Gram
matrix, measured once by streaming; one more pass applies the coefficients to the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eutectic.errors import ParameterError
from eutectic.methods._measures import cosines, gram
from eutectic.methods._method import Method, Site, Stats
from eutectic.methods._transforms import total

#: Below this, a sine is 0: the angle is nothing or half a turn.
FLAT = 1e-6


def spherical(weights: Sequence[float] | None, steps: int) -> Method:
    """The experts' mean on the sphere after at most ``steps`` steps, each tensor as one vector, in weight space.

    Raises ParameterError if the weights sum to zero.
    """
    if weights is not None and sum(weights) == 0:
        raise ParameterError(f"the weights {list(weights)} sum to zero, so they have no mean")

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return total(x_K, mean_coefficients(stats["gram"], weights, steps).tolist())

    count = None if weights is None else len(weights)
    return Method(apply, measures=(gram(),), space="weight", experts=(count or 1, count))


def mean_coefficients(gram_KK: Tensor, weights: Sequence[float] | None, steps: int) -> Tensor:
    """cₖ with Σ cₖ xₖ = (Σ aₖ ‖xₖ‖) · u, u the mean of the directions x̂ₖ = xₖ / ‖xₖ‖ with weights aₖ, Σ aₖ = 1.

        u₀ = Σ aₖ x̂ₖ / ‖·‖,   v = Σ aₖ log_u x̂ₖ = Σ aₖ (θₖ / sin θₖ)(x̂ₖ − cos θₖ u),   u ← cos‖v‖ u + sin‖v‖ v / ‖v‖

    stopping early when v vanishes.  A zero vector has no direction and counts only in the norm; the opposite pole of u has
    no logarithm and is left out.  Where the directions cancel there is no u₀: the straight mean, cₖ = aₖ, is taken.
    """
    norms = gram_KK.diagonal().sqrt()
    cosines_KK = cosines(gram_KK)
    a = torch.ones_like(norms) if weights is None else torch.tensor(list(weights), dtype=norms.dtype)
    a = a / a.sum()
    heading = torch.where(norms > 0, a, 0)
    length = _length(heading, cosines_KK)
    if length < FLAT or heading.sum().abs() < FLAT:
        return a
    u = heading / length
    for _ in range(steps):
        cos = (cosines_KK @ u).clamp(-1, 1)
        sin = (1 - cos * cos).sqrt()
        stretched = heading / heading.sum() * torch.where(sin > FLAT, torch.arccos(cos) / sin, (cos > 0).to(cos))
        v = stretched - (stretched @ cos) * u
        length = _length(v, cosines_KK)
        u = torch.cos(length) * u + torch.sinc(length / torch.pi) * v
        u = u / _length(u, cosines_KK)
        if length < 1e-8:
            break
    return torch.where(norms > 0, u * (a @ norms) / norms, 0)


def _length(coefficients: Tensor, cosines_KK: Tensor) -> Tensor:
    return (coefficients @ cosines_KK @ coefficients).clamp(min=0).sqrt()
