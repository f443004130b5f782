"""SLERP: walk the great circle between two models, tensor by tensor."""

from __future__ import annotations

import math

from torch import Tensor

from eutectic.methods._measures import gram
from eutectic.methods._method import Finite, Method, Site, Stats

REFERENCE = "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985"


def slerp(t: Finite = 0.5) -> Method:
    """Interpolate two experts along the arc between them, each tensor as one vector.

        θ = [ sin((1 − t) ω) θ₁ + sin(t ω) θ₂ ] / sin ω,   cos ω = ⟨θ₁, θ₂⟩ / ‖θ₁‖‖θ₂‖

    Takes exactly two experts and no base (given one, it is ignored).  Where the two point the same way, opposite ways, or
    one is zero, the arc is not defined (sin ω < 10⁻⁶) and the straight line (1 − t) θ₁ + t θ₂ is taken.

    Args:
        t: 0 is the first expert, 1 the second.

    Source: Shoemake, SIGGRAPH 1985, for unit vectors.  Differs in that the tensors keep their own norms, as is usual in
    merging; mergekit already takes the line from cos ω > 0.9995 on, where most fine-tunes of one base lie.
    """

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        first, second = _coefficients(stats["gram"].tolist(), t)
        return first * x_K[0] + second * x_K[1]

    return Method(apply, measures=(gram(),), space="weight", experts=(2, 2))


def _coefficients(gram_KK: list[list[float]], t: float) -> tuple[float, float]:
    (aa, ab), (_, bb) = gram_KK
    a, b = math.sqrt(aa), math.sqrt(bb)
    if not a or not b:
        return 1 - t, t
    cosine = max(-1.0, min(1.0, ab / a / b))
    # (1 − c)(1 + c), not 1 − c²: it keeps the digits of nearly parallel tensors
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    if sine < 1e-6:
        return 1 - t, t
    omega = math.atan2(sine, cosine)
    return math.sin((1 - t) * omega) / sine, math.sin(t * omega) / sine
