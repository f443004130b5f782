"""MagMax: of every entry, keep the task vector's that moved most."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._method import Finite, Method, Site, Stats, chain
from eutectic.methods._transforms import scale_by

REFERENCE = "Marczak et al., MagMax: leveraging model merging for seamless continual learning, ECCV 2024, arXiv:2407.06322"
#: candidates for a choice on validation data
GRID = {"scale": (0.3, 0.4, 0.5, 0.75, 1.0)}


def magmax(scale: Finite = 0.5) -> Method:
    """Take each entry from the task vector in which it is largest in magnitude.

        θ = θ₀ + λ τ,   τ[i] = τₖ[i] with k = argmax |τₖ[i]|

    Args:
        scale: λ; 0.5 in the authors' scripts.

    Source: Marczak et al., ECCV 2024, arXiv:2407.06322, where the experts are fine-tuned one from the other.  Differs from
    the authors' code where +m and −m tie for the largest: it takes the later expert's, here the two cancel to 0, so that
    the experts' order does not matter (in bfloat16 ties are common).
    """

    def largest(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        up, down = x_K.amax(0), x_K.amin(0)
        return torch.where(up > -down, up, torch.where(up < -down, down, 0))

    return chain(Method(largest), scale_by(scale))
