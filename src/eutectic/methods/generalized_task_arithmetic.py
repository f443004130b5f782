"""Generalized task arithmetic: prune each task vector, weigh it, vote on signs, add; each step in the variant you name."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from eutectic.errors import ParameterError
from eutectic.methods._measures import magnitude_bits
from eutectic.methods._method import Finite, Fraction, Measure, Method, Seed, Site, Stats, chain
from eutectic.methods._transforms import agreeing_mean, band, count_of, drop, elect, magprune, scale_by, total

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257"


def generalized_task_arithmetic(
    prune: Literal["none", "magnitude", "band", "random", "rank"] = "none",
    density: Fraction | list[Fraction] = 1.0,
    epsilon: Fraction = 0.15,
    gamma: Fraction = 0.01,
    rescale: Literal["none", "probability", "l1"] = "none",
    votes: Literal["none", "plain", "weighted"] = "none",
    combine: Literal["sum", "mean"] = "mean",
    weights: list[Finite] | None = None,
    scale: Finite = 1.0,
    seed: Seed = 0,
) -> Method:
    """Prune, rescale, weigh, vote, add: what TIES, DARE, DELLA and breadcrumbs share, for recipes that mix their steps.

        θ = θ₀ + λ Σₐ wₖ τ̂ₖ [/ Σₐ wₖ],   τ̂ₖ = rₖ · mₖ ⊙ τₖ,   a = { k : sgn τ̂ₖ = the elected sign }

    Args:
        prune: mₖ keeps all; the largest magnitudes of a tensor (TIES); those in a band (breadcrumbs); random entries (DARE);
            random entries, larger ones more often (DELLA).
        density: the fraction that is kept, 0 to 1; one for all experts or one each.
        epsilon: of ``prune: rank``, see ``della``.
        gamma: of ``prune: band``, see ``breadcrumbs``.
        rescale: rₖ is 1; one over the probability (random, rank); or what restores the tensor's ‖τₖ‖₁.
        votes: nobody is elected, a is everybody; sgn Σ τ̂ₖ, as in TIES; sgn Σ wₖ τ̂ₖ with 0 taken for +, as in mergekit.
        combine: add, or divide by the weights of those that were added (with plain votes by their |wₖ|, as in ``ties``).
        weights: wₖ, one number an expert; all 1 if left out.
        scale: λ.
        seed: of the counter-based random numbers.

    Raises:
        ParameterError: no probability to rescale by, weights without votes that sum to zero, or as ``della``, ``breadcrumbs``.

    Source: the task-vector methods of mergekit (Goddard et al., 2024, arXiv:2403.13257) as one.  Differs from mergekit in
    that round(density · N) entries are kept, at least one, and all that tie; in the band of small tensors, see
    ``breadcrumbs``; and in its random numbers, which depend on neither order nor threads.
    """
    mask = {
        "none": lambda: Method(lambda x_K, site, stats: x_K),
        "magnitude": lambda: band(density, 0.0),
        "band": lambda: band(density, gamma),
        "random": lambda: drop(density, seed),
        "rank": lambda: magprune(density, epsilon, seed),
    }[prune]()
    if rescale == "probability" and prune not in ("random", "rank"):
        raise ParameterError(f"rescale = 'probability' needs prune = 'random' or 'rank', not {prune!r}")
    if rescale != "probability":
        link = mask.apply
        mask = mask._replace(apply=lambda x_K, site, stats: torch.where(link(x_K, site, stats) != 0, x_K, 0))
    if rescale == "l1":
        mask = _same_l1(mask)
    return chain(mask, _weigh(votes, combine, weights), scale_by(scale))


def _same_l1(mask: Method) -> Method:
    """What the mask keeps, times Σ |x| / Σ |kept| of each expert's tensor; 1 where nothing is kept."""

    def observe(state: Tensor, x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return state + torch.stack([_histogram(x) for x in torch.cat([x_K, mask.apply(x_K, site, stats)])])

    def finish(state: Tensor) -> Tensor:
        before, after = torch.tensor([_sum(row) for row in state.tolist()], dtype=torch.float64).chunk(2)
        return torch.where(after > 0, before / after, 1)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return mask.apply(x_K, site, stats) * stats["l1"].to(x_K.dtype).view(-1, *[1] * (x_K.ndim - 1))

    measure = Measure("l1", lambda k: torch.zeros(2 * k, 256, dtype=torch.int64), observe, torch.add, finish)
    return mask._replace(apply=apply, measures=(*mask.measures, measure))


def _histogram(x: Tensor) -> Tensor:
    """Σ of the magnitudes' mantissas for each exponent of float32: integers, so that the sum is exact in any order."""
    bits = magnitude_bits(x).flatten()
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | torch.where(exponent > 0, 0x800000, 0)
    return torch.bincount(exponent, mantissa.double(), minlength=256).long()


def _sum(mantissas: list[int]) -> float:
    return math.fsum(math.ldexp(mantissa, max(exponent, 1) - 150) for exponent, mantissa in enumerate(mantissas))


def _weigh(votes: str, combine: str, weights: list[float] | None) -> Method:
    if votes == "plain" and combine == "mean":
        return chain(agreeing_mean(weights))
    if votes == "none" and combine == "mean" and weights is not None and sum(weights) == 0:
        raise ParameterError(f"the weights {weights} sum to zero, so they have no mean")

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        w = weights or [1.0] * len(x_K)
        kept_K = elect().apply(x_K, site, stats) if votes == "plain" else x_K
        kept_K = torch.stack([x * weight for x, weight in zip(kept_K, w, strict=True)])
        if votes == "weighted":
            kept_K = torch.where(kept_K * torch.where(total(kept_K) < 0, -1, 1) > 0, kept_K, 0)
        if combine == "sum":
            return total(kept_K)
        if votes == "none":
            return total(kept_K) / sum(w)
        mass = total((kept_K != 0).to(x_K.dtype), w)
        return total(kept_K) / torch.where(mass != 0, mass, 1)

    return Method(apply, experts=count_of(weights))
