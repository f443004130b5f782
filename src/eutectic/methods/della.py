"""DELLA: drop the small entries of each row more often than the large ones, rescale, elect signs, average those that agree."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, Seed, chain
from eutectic.methods._transforms import agreeing_mean, magprune, scale_by

REFERENCE = "Deep et al., DELLA-Merging: magnitude-based sampling, 2024, arXiv:2406.11617"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def della(
    density: Fraction | list[Fraction] = 0.5,
    epsilon: Fraction = 0.1,
    scale: Finite = 1.0,
    weights: list[Finite] | None = None,
    seed: Seed = 0,
) -> Method:
    """Sample each row of a task vector by the rank of the magnitudes (MAGPRUNE), vote on signs, average those that agree.

        pᵢ = p − ε + 2ε · rᵢ / (n − 1),   τ̃ᵢ = mᵢ τᵢ / pᵢ,  mᵢ ~ Bernoulli(pᵢ)      (rᵢ: rank of |τᵢ| in its row, 0 … n − 1)
        γ = sgn Σ τ̃ₖ,   θ = θ₀ + λ Σₐ wₖ τ̃ₖ / Σₐ |wₖ|,   a = { k : sgn τ̃ₖ = γ }

    Args:
        density: p, the mean probability that an entry survives, above 0 and up to 1; one for all experts or one each.
        epsilon: ε, 0 to 1: the smallest of a row is kept with p − ε and the largest with p + ε, both in ]0, 1].
        scale: λ.
        weights: wₖ, one number an expert, in their order; equal if left out.  They weigh the mean and not the votes.
        seed: of the counter-based random numbers; one seed gives one result, whatever the order, threads or chunks.

    Raises:
        ParameterError: a density is 0, p ± ε leaves ]0, 1] (p = 1 keeps all, whatever ε), or the lists differ in length.

    Source: Deep et al., 2024, arXiv:2406.11617 (MAGPRUNE, Elect, Fuse), with ε as in the authors' code: half of
    what the probabilities spread over.  Differs from that code in that a row of one entry is kept with p (there it is
    0 / 0).  Differs from mergekit, which divides a tensor by one number, its loss of L1 norm, not each entry by its own
    pᵢ: there large entries come out too large and small ones too small.  The rows of convolutions are their filters.
    """
    return chain(magprune(density, epsilon, seed), agreeing_mean(weights), scale_by(scale))
