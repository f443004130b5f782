"""The links that papers are chained from.  Each is a pure function on x_K, the experts' stacked task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eutectic.errors import ParameterError
from eutectic.methods._measures import flat, kth_magnitude, order_statistics
from eutectic.methods._method import Method, Over, Scope, Site, Stats
from eutectic.methods._native import agree, random_uint32, toss, total
from eutectic.methods._native import band as keep_band
from eutectic.methods._native import magprune as prune_by_rank


def trim(density: float, over: Over) -> Method:
    """Keep each expert's largest magnitudes: max(1, round(density · N)) of them, and all that tie with the least.

    ``over`` says what N counts: one tensor, or the whole model.  Density 0 keeps nothing.
    """
    if density == 0:
        return Method(lambda x_K, site, stats: torch.zeros_like(x_K))
    if density == 1:
        return Method(lambda x_K, site, stats: x_K)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return torch.stack([keep_band(x, bits) for x, bits in zip(x_K, stats["threshold"].tolist(), strict=True)])

    return Method(apply, measures=kth_magnitude(density, over))


def drop(density: float | Sequence[float], seed: int) -> Method:
    """Keep each element with probability ``density``, independently, and divide the kept ones by it.

    The coin of an element is a counter-based random number of (seed, tensor name, expert name, flat index): it depends
    on neither threads, order nor chunking.
    """
    _require_density(density)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        rows = zip(x_K, each(density, len(x_K)), site.experts, strict=True)
        return torch.stack([toss(x, _coins(seed, site, expert, x.numel()), p) for x, p, expert in rows])

    return Method(apply, experts=count_of(density), sited=True)


def magprune(density: float | Sequence[float], epsilon: float, seed: int) -> Method:
    """``drop``, where within each row the keep probability climbs evenly with the rank of the magnitude.

    The smallest of a row is kept with probability ``density − epsilon``, the largest with ``density + epsilon``; equal
    magnitudes rank by their place.  Each kept element is divided by its own probability; density 1 keeps all as it is.
    """
    _require_density(density)
    for p in [density] if isinstance(density, (int, float)) else density:
        if p < 1 and not epsilon < p <= 1 - epsilon:
            raise ParameterError(
                f"density = {p} ± epsilon = {epsilon} leaves the probabilities ]0, 1]; "
                f"give an epsilon below {min(p, 1 - p):.6g}, or density 1, which drops nothing"
            )

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        pruned = []
        for x, p, expert in zip(as_rows(x_K, site), each(density, len(x_K)), site.experts, strict=True):
            last = x.shape[-1] - 1
            least, step = (p - epsilon, 2 * epsilon / last) if last > 0 else (p, 0.0)  # a row of one is kept with p
            pruned.append(x if p == 1 else prune_by_rank(x, _coins(seed, site, expert, x.numel()), least, step))
        return torch.stack(pruned).view(x_K.shape)

    return Method(apply, Scope.ROW, experts=count_of(density), sited=True)


def _coins(seed: int, site: Site, expert: str, n: int) -> np.ndarray:
    """Random numbers for n entries of a tensor of an expert, from the site's start on; uniform in 32 bits."""
    return random_uint32((seed, site.name, expert), site.start, n)


def band(density: float | Sequence[float], gamma: float) -> Method:
    """Zero the largest magnitudes of each expert's tensor, and the smallest: what is kept ranks right after the former.

    round(gamma · N) are the largest, and max(1, round(density · N)) are kept, with what ties with either end of them.
    Density 0 keeps nothing.
    """
    for p in [density] if isinstance(density, (int, float)) else density:
        if p + gamma > 1 + 1e-9:
            raise ParameterError(f"density = {p} and gamma = {gamma} ask for more than all entries; their sum may be 1 at most")

    def ends(n_K: Tensor) -> Tensor:
        n_K = n_K.double()
        kept_K = (n_K * torch.tensor(each(density, len(n_K))[: len(n_K)], dtype=torch.float64)).round().clamp(min=1)
        cut_K = torch.minimum((n_K * gamma).round(), n_K - kept_K).clamp(min=0)
        return torch.cat([cut_K + 1, cut_K + kept_K]).long()

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        highest_K, lowest_K = stats["threshold"].view(2, -1).tolist()
        rows = zip(x_K, each(density, len(x_K)), lowest_K, highest_K, strict=True)
        return torch.stack([keep_band(x, least, most) if p > 0 else torch.zeros_like(x) for x, p, least, most in rows])

    return Method(apply, measures=order_statistics(flat, ends, "tensor"), experts=count_of(density))


def each(values: float | Sequence[float], k: int) -> list[float]:
    """One number for each of k experts, of one for all or a list."""
    return [values] * k if isinstance(values, (int, float)) else list(values)


def count_of(*parameters: float | Sequence[float] | None) -> tuple[int, int | None]:
    """The allowed number of experts, (least, most), that lists with one entry an expert imply.

    Raises ParameterError if two lists differ in length.
    """
    counts = {len(values) for values in parameters if values is not None and not isinstance(values, (int, float))}
    if len(counts) > 1 or 0 in counts:
        raise ParameterError(f"parameters with one number an expert must agree in their length, got {sorted(counts)}")
    return (1, None) if not counts else (min(counts), min(counts))


def as_rows(x_K: Tensor, site: Site) -> Tensor:
    """``[K, rows, row]``, however the chunk was cut: all of a vector is one row, else all but the first axis."""
    row = math.prod(site.shape[1:] if len(site.shape) > 1 else site.shape)
    return x_K.reshape(len(x_K), -1, max(1, row))


def _require_density(density: float | Sequence[float]) -> None:
    if density == 0 or (not isinstance(density, (int, float)) and 0 in density):
        raise ParameterError("density = 0 drops everything and cannot be rescaled; give a density above 0")


def elect() -> Method:
    """Zero whatever disagrees in sign with the total mass Σ x_k of its element; a total of exactly 0 elects nobody."""

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        sign = torch.sign(total(x_K))
        return torch.relu(x_K * sign).mul_(sign)  # several times as fast as torch.where, and as exact

    return Method(apply)


def agreeing_mean(weights: Sequence[float] | None = None) -> Method:
    """``elect``, then ``disjoint_mean``, in one go."""
    return Method(lambda x_K, site, stats: agree(x_K, weights), experts=count_of(weights))


def disjoint_mean(weights: Sequence[float] | None = None) -> Method:
    """Mean over the experts whose element is not zero; 0 where there is none.

    With weights Σ w_k x_k / Σ |w_k|, both over those experts; 0 where all of these weights are.
    """

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        if weights is None:
            return total(x_K) / total(x_K.sign().abs_()).clamp_(min=1)
        mass = total((x_K != 0).to(x_K.dtype), [abs(weight) for weight in weights])
        return total(x_K, weights) / torch.where(mass > 0, mass, 1)

    return Method(apply, experts=count_of(weights))


def weighted_sum(weights: Sequence[float] | float) -> Method:
    """Σ w_k x_k, in the experts' order; a single number is every expert's weight."""

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        if isinstance(weights, (int, float)):
            return total(x_K) * weights
        return total(x_K, weights)

    return Method(apply, experts=(1, None) if isinstance(weights, (int, float)) else (len(weights), len(weights)))


def active(epsilon: float) -> Method:
    """Zero the elements whose magnitude is not above ``epsilon``."""
    return Method(lambda x_K, site, stats: x_K * (x_K.abs() > epsilon))


def scale_by(factor: float) -> Method:
    """Multiply by one number."""
    return Method(lambda x, site, stats: x * factor)
