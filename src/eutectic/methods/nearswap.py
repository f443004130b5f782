"""NearSwap: follow the expert where it stays near the base, and no further than t."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._method import Method, Positive, Site, Stats

REFERENCE = "alchemonaut, QuartetAnemoi-70B-t0.0001, model card, Hugging Face 2024"


def nearswap(t: Positive = 1e-4) -> Method:
    """Go from the base towards the expert by at most t in every entry.

        θ = s θ₁ + (1 − s) θ₀,   s = min(1, t / |θ₁ − θ₀|)          that is, θ = θ₀ + clip(τ, −t, t)

    Takes exactly one expert besides the base.

    Args:
        t: the largest change; the model that the method is known from has 10⁻⁴.

    Source: the model card of alchemonaut/QuartetAnemoi-70B-t0.0001, 2024.  Does not differ from it, nor from mergekit's
    ``nearswap``.
    """

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        most = min(t, torch.finfo(x_K.dtype).max)
        return x_K[0].clamp(-most, most)

    return Method(apply, experts=(1, 1))
