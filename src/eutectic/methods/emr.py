"""EMR-merging: elect one unified task vector; each expert is rebuilt from it by a mask and one number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eutectic.errors import ParameterError
from eutectic.methods._method import BLOCK, Measure, Method, Site, Stats
from eutectic.methods._transforms import total

Mass = tuple[list[float], ...]

REFERENCE = "Huang et al., EMR-Merging, NeurIPS 2024, arXiv:2405.17461"


def emr(expert: str | None = None) -> Method:
    """Elect a unified task vector; with ``expert``, mask and rescale it into an approximation of that expert.

        γ = sgn Σ τₖ,   τ = γ ⊙ max{ |τₖ| : sgn τₖ = γ }                   without ``expert``:  θ = θ₀ + τ
        mₖ = [ τₖ ⊙ τ > 0 ],   ρₖ = Σ |τₖ| / Σ |mₖ ⊙ τ|                     with it:             θ = θ₀ + ρₖ mₖ ⊙ τ

    The sums run over the whole model, streamed.  Keep θ₀ + τ for all tasks, and a bit an entry and ρₖ for each.

    Args:
        expert: name of the expert to rebuild; none for the unified model.

    Raises:
        ParameterError: on reading, if no expert has the name.

    Source: Huang et al., NeurIPS 2024, arXiv:2405.17461, Algorithm 1.  Differs from the paper in that the unified model is
    a model of its own; from the authors' code, which in ρ adds the means of the tensors and not their entries.  Where the
    votes cancel exactly, τ is 0.
    """
    if expert is None:
        return Method(lambda x_K, site, stats: _unified(x_K))

    def kept(x_K: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        if expert not in site.experts:
            raise ParameterError(f"emr: no expert is called {expert!r}; there are {', '.join(site.experts)}")
        x, unified = x_K[site.experts.index(expert)], _unified(x_K)
        return x, torch.where(x * torch.sign(unified) > 0, unified, 0)

    def observe(state: Mass, x_K: Tensor, site: Site, stats: Stats) -> Mass:
        return tuple(_exact(sums, _blocks(x.abs())) for sums, x in zip(state, kept(x_K, site), strict=True))

    def merge(a: Mass, b: Mass) -> Mass:
        return tuple(_exact(sums, more) for sums, more in zip(a, b, strict=True))

    def finish(state: Mass) -> float:
        whole, masked = map(math.fsum, state)
        return whole / masked if masked else 1.0

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return kept(x_K, site)[1] * stats["rescale"]

    return Method(apply, measures=(Measure("rescale", lambda k: ([], []), observe, merge, finish, "model"),))


def _blocks(x: Tensor) -> list[float]:
    """Sums over blocks of 4,096, which are the same bits however the tensor was cut."""
    return [float(block.sum()) for block in x.flatten().double().split(BLOCK)]


def _exact(sums: list[float], more: list[float]) -> list[float]:
    """A few numbers whose sum is that of all these, without rounding: so the order in which they came does not matter."""
    left, found = [*sums, *more], []
    while part := math.fsum(left):
        found.append(part)
        left.append(-part)
    return found


def _unified(x_K: Tensor) -> Tensor:
    sign = torch.sign(total(x_K))
    return sign * (x_K * sign).amax(0).clamp(min=0)
