"""TIES-Merging: trim each task vector, elect signs by mass, average those that agree."""

from __future__ import annotations

from eutectic.methods._method import Finite, Fraction, Method, Over, chain
from eutectic.methods._transforms import agreeing_mean, scale_by, trim

REFERENCE = "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def ties(density: Fraction = 0.2, scale: Finite = 1.0, over: Over = "model") -> Method:
    """Keep the top ``density`` of each task vector, vote on signs by mass, average those that agree.

        τ̂ₖ = trim(τₖ),   γ = sgn Σ τ̂ₖ,   θ = θ₀ + λ · mean{ τ̂ₖ : sgn τ̂ₖ = γ }      (the mean over non-zero entries)

    Args:
        density: fraction of entries that survives the trim; the paper's top-k %.
        scale: λ; the paper's best lies between 0.8 and 1.8.
        over: rank magnitudes over the whole model, as the authors do, or tensor by tensor, as mergekit does.

    Source: Yadav et al., NeurIPS 2023, arXiv:2306.01708, Algorithm 1.  Differs from the authors' code where the votes
    cancel exactly: it gives such entries the majority sign of the whole vector, here they stay 0.  Entries that tie
    with the threshold are all kept.
    """
    return chain(trim(density, over), agreeing_mean(), scale_by(scale))
