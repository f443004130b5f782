"""DARE-TIES: drop most of each task vector at random and rescale the rest, then elect signs and average those that agree."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, Seed, chain
from eutectic.methods._transforms import agreeing_mean, drop, scale_by

REFERENCE = "Yu et al., Language models are Super Mario (DARE), ICML 2024, arXiv:2311.03099"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def dare_ties(
    density: Fraction | list[Fraction] = 0.5, scale: Finite = 1.0, weights: list[Finite] | None = None, seed: Seed = 0
) -> Method:
    """Drop at random and rescale as DARE does, then vote on signs and average as TIES does.

        τ̃ₖ = mₖ ⊙ τₖ / pₖ,  mₖ ~ Bernoulli(pₖ),   γ = sgn Σ τ̃ₖ,   θ = θ₀ + λ Σₐ wₖ τ̃ₖ / Σₐ |wₖ|,   a = { k : sgn τ̃ₖ = γ }

    Args:
        density: pₖ, the probability that an entry survives, above 0 and up to 1; one for all experts or one each.
        scale: λ.
        weights: wₖ, one number an expert, in their order; equal if left out.  They weigh the mean and not the votes.
        seed: of the counter-based random numbers; one seed gives one result, whatever the order, threads or chunks.

    Raises:
        ParameterError: a density is 0, or the lists differ in length.

    Source: Yu et al., ICML 2024, arXiv:2311.03099 (DARE before TIES-Merging), with Algorithm 1 of Yadav et
    al., NeurIPS 2023, without its trim.  Differs from the paper in that experts may be weighted.  Differs from mergekit,
    which matches the L1 norm of each tensor instead of dividing by p, applies the weights before the votes and
    adds those that agree instead of averaging them.
    """
    return chain(drop(density, seed), agreeing_mean(weights), scale_by(scale))
