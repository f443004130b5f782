"""RAM: keep what only one expert changed as it is, and average what several changed."""

from __future__ import annotations

from eutectic.methods._method import Finite, Method, NonNegative, chain
from eutectic.methods._transforms import active, disjoint_mean, scale_by

REFERENCE = "Yuan et al., Behavior knowledge merge in reinforced agentic models (RAM), 2026, arXiv:2601.13572"
#: candidates for a choice on validation data
GRID = {"scale": (0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.0)}


def ram(epsilon: NonNegative = 1e-5, scale: Finite = 1.0) -> Method:
    """Average each entry over the experts that changed it.

        θ = θ₀ + λ · Σₐ τₖ / |a|,   a = { k : |τₖ| > ε }                                     (0 where nobody changed it)

    Args:
        epsilon: ε, 0 or more: changes up to it count as none.  It is absolute: at home with reinforcement learning in
            bfloat16, where most weights stay exactly as they were; take a smaller one for small learning rates.
        scale: λ; the paper has 1.

    Source: Yuan et al., 2026, arXiv:2601.13572 (RAM); mergekit's ``ram``.  Differs from neither in its equation, but
    that the paper has no λ.
    """
    return chain(active(epsilon), disjoint_mean(), scale_by(scale))
