"""DARE: drop most of each task vector at random and rescale the rest, then add them."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, Seed, chain
from eutectic.methods._transforms import drop, weighted_sum

REFERENCE = "Yu et al., Language models are Super Mario (DARE), ICML 2024, arXiv:2311.03099"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.15, 0.2, 0.3, 0.4)}


def dare(density: Fraction = 0.5, scale: Finite = 0.3, seed: Seed = 0) -> Method:
    """Drop each entry of a task vector with probability 1 − density, divide the rest by density, add the results.

        τ̃ₖ = mₖ ⊙ τₖ / p,   mₖ ~ Bernoulli(p),   θ = θ₀ + λ Σ τ̃ₖ                 (p = density)

    Args:
        density: probability that an entry survives; the paper's 1 − p, which it takes between 0.1 and 0.9.
        scale: λ.
        seed: of the counter-based random numbers; one seed gives one result, whatever the order, threads or chunks.

    Raises:
        ParameterError: density is 0.

    Source: Yu et al., ICML 2024, arXiv:2311.03099, equations 1 to 3, merged by task arithmetic.  Differs from mergekit, which
    rescales to the L1 norm from before the drop instead of dividing by p.
    """
    return chain(drop(density, seed), weighted_sum(scale))
