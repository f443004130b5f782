"""Model Stock: how far to go from the base to the experts' mean, from the angle between them."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._measures import cosines, gram
from eutectic.methods._method import Method, Site, Stats
from eutectic.methods._transforms import total

REFERENCE = "Jang et al., Model stock: all we need is just a few fine-tuned models, ECCV 2024, arXiv:2403.19522"


def model_stock() -> Method:
    """Interpolate between the base and the experts' mean, tensor by tensor, to come nearest to the centre of all fine-tunes.

        θ = θ₀ + t · mean τₖ,   t = K c / (1 + (K − 1) c),   c = mean_{i<j} cos ∠(τᵢ, τⱼ)

    Takes two experts or more, meant to be fine-tunes for one task.  c is taken to be at least 0, so that t lies in [0, 1]:
    experts that disagree (c ≤ 0) leave the base as it is.  An angle with a zero task vector counts as a right angle.

    Source: Jang et al., ECCV 2024, arXiv:2403.19522, section 4 and, for K > 2, its appendix.  Differs from the paper, which
    assumes acute angles, in that bound; mergekit has none: there c < 0 walks away from the experts, without limit near
    c = −1 / (K − 1), and task vectors with norms below about 10⁻³ count as orthogonal.
    """

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return total(x_K) * (ratio(stats["gram"]) / len(x_K)).item()

    return Method(apply, measures=(gram(),), experts=(2, None))


def ratio(gram_KK: Tensor) -> Tensor:
    """The share t of the Gram matrix ``[*, K, K]`` of the task vectors."""
    k = gram_KK.shape[-1]
    apart = ~torch.eye(k, dtype=torch.bool)
    c = cosines(gram_KK)[..., apart].mean(-1).clamp(min=0)
    return k * c / (1 + (k - 1) * c)
