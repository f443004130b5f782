"""LiNeS: scale what another method merged by depth, little near the input and fully near the output."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from eutectic.methods._method import Finite, Measure, Method, Site, Stats, build_inner, chain

REFERENCE = "Wang et al., LiNeS: post-training layer scaling, ICLR 2025, arXiv:2410.17146"
#: candidates for a choice on validation data
GRID = {"alpha": (0.5,), "beta": (0.5, 1.0, 1.5, 2.0)}


def lines(
    method: str = "task_arithmetic", parameters: dict[str, Any] | None = None, alpha: Finite = 0.5, beta: Finite = 0.5
) -> Method:
    """Scale the merged task vector of block l of L by a line over the depth.

        θ = θ₀ + (α + β · l / (L − 1)) · τ,   l = 0 … L − 1,   τ = method(τ₁ … τ_K)         outside of the blocks:  θ₀ + α τ

    The block is the first number between dots in a tensor's name (``layers.7.mlp``); L is one more than the largest in
    the model, counted in a pass of its own.

    Args:
        method: name of the wrapped method; one on task vectors.
        parameters: the wrapped method's own; its defaults if left out.
        alpha: α, the factor of the first block and of what lies outside of the blocks (embeddings, heads).
        beta: β, what the last block has more; one task alone takes 1 − α.

    Raises:
        UnknownNameError: there is no such method.
        ParameterError: the wrapped method's parameters, or it works on weights.

    Source: Wang et al., ICLR 2025, arXiv:2410.17146, equation 1.  Differs from the paper for merges, where it sets α from
    the norms of the task vectors (Σ ‖τₖ‖ / ‖Σ τₖ‖ / K): here α is given.  Where there is one block, it has α.
    """
    inner = build_inner("lines", method, parameters)
    measured = chain(Method(lambda x_K, site, stats: x_K, measures=(_blocks(),)), inner)

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        depth = max(0, _block(site.name)) / max(1, stats["0.blocks"] - 1)
        return measured.apply(x_K, site, stats) * (alpha + beta * depth)

    return measured._replace(apply=apply, sited=True)


def _block(name: str) -> int:
    """The number of a tensor's block; −1 outside of the blocks."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else -1


def _blocks() -> Measure:
    """How many blocks the model has: stat ``blocks``."""

    def observe(state: int, x_K: Tensor, site: Site, stats: Stats) -> int:
        return max(state, _block(site.name) + 1)

    return Measure("blocks", lambda k: 0, observe, max, lambda state: state, "model")
