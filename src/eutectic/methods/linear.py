"""Linear: a weighted sum of the experts' weights, not divided by anything; it needs no base."""

from __future__ import annotations

from eutectic.methods._method import Finite, Method
from eutectic.methods._transforms import total, weighted_sum

REFERENCE = "Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482"


def linear(weights: list[Finite] | None = None) -> Method:
    """Add the experts' weights, each with its own factor.

        θ = Σ wₖ θₖ

    ``average`` divides by Σ wₖ.

    Args:
        weights: wₖ, one number an expert, in their order; 1 / K each if left out.

    Source: mergekit's ``linear`` with ``normalize: false`` (Goddard et al., 2024, arXiv:2403.13257).  Differs from the soup
    of Wortsman et al., ICML 2022, arXiv:2203.05482, in that the weights need not sum to one.
    """
    if weights is None:
        return Method(lambda x_K, site, stats: total(x_K) / len(x_K), space="weight")
    return weighted_sum(weights)._replace(space="weight")
