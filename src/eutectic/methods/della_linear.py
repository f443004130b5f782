"""DELLA without the election: drop the small entries of each row more often than the large ones, rescale, and add."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, Seed, chain
from eutectic.methods._transforms import magprune, weighted_sum

REFERENCE = "Deep et al., DELLA-Merging: magnitude-based sampling, 2024, arXiv:2406.11617"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.15, 0.2, 0.3, 0.4)}


def della_linear(
    density: Fraction | list[Fraction] = 0.5,
    epsilon: Fraction = 0.1,
    scale: Finite = 0.3,
    weights: list[Finite] | None = None,
    seed: Seed = 0,
) -> Method:
    """Sample each row of a task vector by the rank of the magnitudes (MAGPRUNE) and add the results.

        pᵢ = p − ε + 2ε · rᵢ / (n − 1),   τ̃ᵢ = mᵢ τᵢ / pᵢ,  mᵢ ~ Bernoulli(pᵢ),   θ = θ₀ + λ Σ wₖ τ̃ₖ

    with rᵢ the rank of |τᵢ| in its row, 0 … n − 1.  Over many seeds the mean is task arithmetic.

    Args:
        density: p, the mean probability that an entry survives, above 0 and up to 1; one for all experts or one each.
        epsilon: ε, 0 to 1: the smallest of a row is kept with p − ε and the largest with p + ε, both in ]0, 1].
        scale: λ.
        weights: wₖ, one number an expert, in their order; all 1 if left out.
        seed: of the counter-based random numbers; one seed gives one result, whatever the order, threads or chunks.

    Raises:
        ParameterError: a density is 0, p ± ε leaves ]0, 1] (p = 1 keeps all, whatever ε), or the lists differ in length.

    Source: Deep et al., 2024, arXiv:2406.11617 (MAGPRUNE), merged by task arithmetic; ε as in the authors' code.
    Differs from that code and from mergekit as ``della`` does.
    """
    return chain(
        magprune(density, epsilon, seed), weighted_sum(scale if weights is None else [scale * weight for weight in weights])
    )
