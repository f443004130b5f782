"""Preferences among objectives, and how losses are weighed by them: p ≥ 0, Σₖ pₖ = 1, over K objectives.

C = the Gram matrix of the losses' gradients ``[K, K]``; α = the weights of a step, on the simplex as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from eutectic.errors import ParameterError, did_you_mean

Preference = dict[str, float] | list[float]
Scalarisation = Literal["linear", "epo", "mgda"]
#: EPO's program is solved by trying the vertices, of which there are 19448 for eight objectives
MOST_OBJECTIVES = 8
#: from here on the weighted losses count as equal
EVEN = 1e-4


def require_preference(given: Preference | None, name: str = "preference") -> None:
    """Raises ParameterError for a weight that is negative, or weights whose sum is not 1."""
    values = [] if given is None else list(given.values() if isinstance(given, Mapping) else given)
    if negative := [value for value in values if value < 0]:
        raise ParameterError(f"{name} = {given}: {negative[0]} is negative, but weights are at least 0", (name,))
    if given is not None and abs(sum(values) - 1) > 1e-6:
        raise ParameterError(f"{name} = {given}: the weights' sum is {sum(values):.6g}, not 1", (name,))


def preferred(given: Preference | None, experts: Sequence[str], name: str = "preference") -> Tensor:
    """The weights p ``[K]`` in float64: in the experts' order, or by name (0 for those not named); by default all the same.

    Raises ParameterError for other names or another number of weights, and as ``require_preference`` does.
    """
    require_preference(given, name)
    if given is None:
        given = [1 / len(experts)] * len(experts)
    if isinstance(given, Mapping):
        for key in given:
            if key not in experts:
                raise ParameterError(f"{name} = {given}: there is no expert {key!r}.{did_you_mean(key, experts)}", (name,))
        given = [given.get(expert, 0.0) for expert in experts]
    if len(given) != len(experts):
        raise ParameterError(f"{name} = {given}: has {len(given)} weights for {len(experts)} experts", (name,))
    return torch.tensor(given, dtype=torch.float64)


def dirichlet(k: int, concentration: float, *key: int) -> Tensor:
    """A preference p ``[K]`` drawn from the symmetric Dirichlet distribution, a function of the key alone."""
    return torch.from_numpy(np.random.default_rng(key).dirichlet([concentration] * k))


def simplex_grid(k: int, parts: int) -> Tensor:
    """All p ``[C(parts + K − 1, K − 1), K]`` whose entries are multiples of 1 / parts, from e₁ to e_K."""
    bars = itertools.combinations(range(parts + k - 1), k - 1)
    edges = torch.tensor([(-1, *bar, parts + k - 1) for bar in bars], dtype=torch.float64)
    return (edges.diff(dim=1) - 1).flip(0) / parts


def corners_and_centre(k: int) -> Tensor:
    """e₁ … e_K, and all the same ``[K + 1, K]``."""
    return torch.cat([torch.eye(k, dtype=torch.float64), torch.full((1, k), 1 / k, dtype=torch.float64)])


def step_weights(how: Scalarisation, gram: Tensor, losses: Tensor, preference: Tensor) -> Tensor:
    """α ``[K]`` of a step, whose gradient is Σₖ αₖ ∇Lₖ."""
    match how:
        case "linear":
            return preference
        case "epo":
            return exact(gram, losses, preference)
        case "mgda":
            return min_norm(gram)


def min_norm(gram: Tensor) -> Tensor:
    """The α on the simplex whose Σₖ αₖ ∇Lₖ is shortest, which makes no loss larger; of several, one.

    Source: Désidéri, MGDA, Comptes Rendus Mathématique 350, 2012; by Wolfe's algorithm, Mathematical Programming 11, 1976.
    """
    scale = gram.diagonal().max()
    gram = gram / scale if scale > 0 else gram
    alpha = torch.zeros(len(gram), dtype=torch.float64)
    alpha[gram.diagonal().argmin()] = 1
    for _ in range(16 * len(gram)):  # far more than it takes
        products = gram @ alpha
        best = int(products.argmin())
        if not products[best] < alpha @ products - 1e-12 or alpha[best] > 0:
            break
        alive = alpha > 0
        alive[best] = True
        while not (target := _affine(gram, alive))[alive].gt(0).all():  # whoever would first get less than 0 drops out
            ratios = torch.where(alive & (target <= 0), alpha / (alpha - target).clamp(min=1e-300), torch.inf)
            alpha = (alpha + ratios.min() * (target - alpha)).clamp(min=0)
            alive = alive & (ratios > ratios.min())
            alpha[~alive] = 0
        alpha = target
    return alpha


def _affine(gram: Tensor, alive: Tensor) -> Tensor:
    """The α with sum 1, of any sign, and 0 for those not alive, whose Σₖ αₖ ∇Lₖ is shortest."""
    n = int(alive.sum())
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[n, :n], system[:n, n] = gram[alive][:, alive], 1, 1
    found = torch.zeros(len(gram), dtype=torch.float64)
    found[alive] = torch.linalg.pinv(system, hermitian=True)[:n, n]
    return found


def exact(gram: Tensor, losses: Tensor, preference: Tensor) -> Tensor:
    """The α that leads to losses in inverse proportion to the preference, pₖLₖ all the same, and lowers them from there on.

    With u = pL / Σ pL, its distance from even μ = Σ uₖ log K uₖ and aₖ = pₖ (log K uₖ − μ): while uneven, α makes ⟨α, C a⟩
    largest without raising a loss that need not rise; then 1ᵀC α.  Without such an α it is p.

    Source: Mahapatra and Rajan, Multi-task learning with user preferences: gradient descent with controlled ascent in Pareto
    optimization, ICML 2020, as PWE-MoE (arXiv:2406.09770) uses it.  Differs from the paper where all of C a is negative, so
    that evening out would raise all losses: it then lowers the largest pₖLₖ as fast as can be without raising one.  The paper
    takes the descent that unevens least, which runs into the optimum of one task if that one's loss is 0 there.
    """
    k = len(preference)
    p = preference.clamp(min=1e-3)
    weighted = p * losses.clamp(min=0)
    if not weighted.sum() > 0 or not gram.diagonal().max() > 0:
        return preference
    gram = gram / gram.diagonal().max()
    u = weighted / weighted.sum()
    mu = torch.special.xlogy(u, k * u).sum()
    a = p * ((k * u).clamp(min=1e-12).log() - mu)
    drift = gram @ a
    if mu > EVEN:
        worst, gain, least = weighted.argmax(), drift, torch.where(drift > 0, -torch.inf, drift)
        least[worst] = 0
        if not (drift > 0).any():
            gain, least = gram[worst], torch.zeros_like(drift)
        found = best_vertex(gain, gram, least)
    else:
        rows, least = torch.cat([gram, drift[None]]), torch.zeros(k + 1, dtype=torch.float64)
        least[k] = drift.max().clamp(max=0)
        found = best_vertex(gram.sum(0), rows, least)
    return preference if found is None else found


def best_vertex(gain: Tensor, rows: Tensor, least: Tensor) -> Tensor | None:
    """The α on the simplex with rows α ≥ least whose ⟨gain, α⟩ is largest; None if there is none."""
    k = len(gain)
    bounded = torch.isfinite(least)
    A = torch.cat([torch.eye(k, dtype=torch.float64), rows[bounded]])
    b = torch.cat([torch.zeros(k, dtype=torch.float64), least[bounded]])
    tight = torch.tensor(list(itertools.combinations(range(len(A)), k - 1)), dtype=torch.long).view(
        math.comb(len(A), k - 1), k - 1
    )
    ones = torch.ones(len(tight), 1, k, dtype=torch.float64)
    systems, sides = torch.cat([ones, A[tight]], 1), torch.cat([ones[:, :, 0], b[tight]], 1)
    points, _ = torch.linalg.solve_ex(systems, sides)
    points = points[torch.isfinite(points).all(1)]
    points = points[(points @ A.T >= b - 1e-9).all(1) & ((points.sum(1) - 1).abs() < 1e-9)]
    if not len(points):
        return None
    best = points[(points @ gain).argmax()].clamp(min=0)
    return best / best.sum()
