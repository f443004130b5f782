"""Average: the (weighted) mean of the experts' weights; it needs no base."""

from __future__ import annotations

from eutectic.errors import ParameterError
from eutectic.methods._method import Finite, Method
from eutectic.methods._transforms import total, weighted_sum

REFERENCE = "Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482"


def average(weights: list[Finite] | None = None) -> Method:
    """Average the experts' weights.

        θ = Σ wₖ θₖ / Σ wₖ

    Args:
        weights: one number an expert, in their order; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: the uniform soup of Wortsman et al., ICML 2022, arXiv:2203.05482.  Differs from the paper in that weights may
    be given; its greedy soup needs data and is not this method.
    """
    if weights is None:
        return Method(lambda x_K, site, stats: total(x_K) / len(x_K), space="weight")
    mass = sum(weights)
    if mass == 0:
        raise ParameterError(f"average: the weights {weights} sum to zero, so they have no mean")
    link = weighted_sum([weight / mass for weight in weights])
    return link._replace(space="weight")
