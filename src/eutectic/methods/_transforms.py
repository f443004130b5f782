"""The links that papers are chained from.  Each is a pure function on x_K, the experts' stacked task vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eutectic.errors import ParameterError
from eutectic.methods._measures import kth_magnitude, magnitude_bits
from eutectic.methods._method import Method, Over, Site, Stats


def trim(density: float, over: Over) -> Method:
    """Keep each expert's largest magnitudes: max(1, round(density · N)) of them, and all that tie with the least.

    ``over`` says what N counts: one tensor, or the whole model.  Density 0 keeps nothing.
    """
    if density == 0:
        return Method(lambda x_K, site, stats: torch.zeros_like(x_K))
    if density == 1:
        return Method(lambda x_K, site, stats: x_K)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        threshold = stats["threshold"].view(-1, *[1] * (x_K.ndim - 1))
        return torch.where(magnitude_bits(x_K) >= threshold, x_K, 0)

    return Method(apply, measures=kth_magnitude(density, over))


def drop(density: float, seed: int) -> Method:
    """Keep each element with probability ``density``, independently, and divide the kept ones by it.

    The coin of an element is a counter-based random number of (seed, tensor name, expert name, flat index): it depends
    on neither threads, order nor chunking.
    """
    if density == 0:
        raise ParameterError("density = 0 drops everything and cannot be rescaled; give a density above 0")

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        n = x_K[0].numel()
        kept = []
        for x, expert in zip(x_K, site.experts, strict=True):
            keep = random_uint32((seed, site.name, expert), site.start, n) < density * 2.0**32
            kept.append(torch.where(torch.from_numpy(keep).view(x.shape), x, 0))
        return torch.stack(kept) / density

    return Method(apply)


def random_uint32(key: tuple[int | str, ...], start: int, n: int) -> np.ndarray:
    """Numbers ``start … start + n`` of the Philox-4x64 stream named by ``key``, uniform in 32 bits.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    per_counter = 8  # one counter makes four 64-bit words
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=start // per_counter)
    skip = start % per_counter
    words = stream.random_raw(-(-(skip + n) // 2))
    return words.view(np.uint32)[skip : skip + n]


def elect() -> Method:
    """Zero whatever disagrees in sign with the total mass Σ x_k of its element; a total of exactly 0 elects nobody."""

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return torch.where(x_K * torch.sign(x_K.sum(0)) > 0, x_K, 0)

    return Method(apply)


def disjoint_mean() -> Method:
    """Mean over the experts whose element is not zero; 0 where there is none."""

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return x_K.sum(0) / x_K.count_nonzero(0).clamp(min=1)

    return Method(apply)


def weighted_sum(weights: Sequence[float] | float) -> Method:
    """Σ w_k x_k, in the experts' order; a single number is every expert's weight."""

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        if isinstance(weights, (int, float)):
            return x_K.sum(0) * weights
        return torch.tensordot(torch.tensor(list(weights), dtype=x_K.dtype), x_K, dims=1)

    return Method(apply, experts=(1, None) if isinstance(weights, (int, float)) else (len(weights), len(weights)))


def scale_by(factor: float) -> Method:
    """Multiply by one number."""
    return Method(lambda x, site, stats: x * factor)
