"""NuSLERP: walk the great circle between two models, as far as their weights say."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eutectic.errors import ParameterError
from eutectic.methods._method import Finite, Method
from eutectic.methods.slerp import slerp

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Shoemake, SIGGRAPH 1985"

Pair = Annotated[list[Finite], Field(min_length=2, max_length=2)]


def nuslerp(weights: Pair | None = None) -> Method:
    """SLERP with a weight for each of the two experts, each tensor as one vector.

        θ = slerp(θ₁, θ₂; t),   t = w₂ / (w₁ + w₂)

    Takes exactly two experts and no base (given one, it is ignored: ``nuslerp_delta`` rotates task vectors).

    Args:
        weights: [w₁, w₂]; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: the method ``nuslerp`` of mergekit (Goddard et al., 2024, arXiv:2403.13257) over Shoemake, SIGGRAPH 1985.
    Differs from mergekit where one tensor is zero (the line, not a quarter turn) and where the weights sum to zero (refused,
    not taken for equal).
    """
    return slerp(share(weights))


def share(weights: Pair | None) -> float:
    """w₂ / (w₁ + w₂); raises ParameterError if that is undefined."""
    first, second = weights or (1.0, 1.0)
    if first + second == 0:
        raise ParameterError(f"the weights {weights} sum to zero, so they have no mean")
    return second / (first + second)
