"""RAM+, tensor by tensor: average what several experts changed, and strengthen what only one did."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._method import Finite, Measure, Method, NonNegative, Site, Stats, chain
from eutectic.methods._transforms import active, scale_by, total

REFERENCE = "Yuan et al., Behavior knowledge merge in reinforced agentic models (RAM), 2026, arXiv:2601.13572"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def ramplus_tl(r: NonNegative = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5, scale: Finite = 1.0) -> Method:
    """Average each entry over the experts that changed it; where that is one, amplify it by how much it shares elsewhere.

        θ = θ₀ + λ · { λₖ τₖ  where only k changed it;  Σₐ τₖ / |a|  where several did },   a = { k : |τₖ| > ε }
        λₖ = 1 + r · min(α, sₖ / uₖ),   sₖ, uₖ = how many of k's changes in this tensor others share, or not

    Args:
        r: strength of the amplification, 0 or more; 0 is ``ram``.
        alpha: α, 0 or more: what the ratio is capped at.
        epsilon: ε, 0 or more: changes up to it count as none; absolute, see ``ram``.
        scale: λ; the paper has 1.

    Source: Yuan et al., 2026, arXiv:2601.13572 (RAM+), and mergekit's ``ramplus_tl``.  Differs from the paper, which
    counts over the whole model and not tensor by tensor (tl: tensor-local); like mergekit's but for λ.
    """

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        shared_K, unique_K = stats["overlap"].double()
        gain_K = 1 + r * (shared_K / unique_K.clamp(min=1)).clamp(max=alpha)
        count = x_K.count_nonzero(0)
        gained = total(x_K * gain_K.to(x_K.dtype).view(-1, *[1] * (x_K.ndim - 1)))
        return torch.where(count > 1, total(x_K) / count.clamp(min=1), gained)

    return chain(active(epsilon), Method(apply, measures=(_overlap(),)), scale_by(scale))


def _overlap() -> Measure:
    """Per expert, the non-zero entries that others have too, and those that none has: stat ``overlap``, int64 ``[2, K]``."""

    def observe(state: Tensor, x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        changed = x_K.reshape(len(x_K), -1) != 0
        alone = changed.sum(0) == 1
        return state + torch.stack([(changed & ~alone).sum(1), (changed & alone).sum(1)])

    return Measure("overlap", lambda k: torch.zeros(2, k, dtype=torch.int64), observe, torch.add, lambda state: state)
