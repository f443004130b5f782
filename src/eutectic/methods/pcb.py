"""PCB-Merging: let the entries of the task vectors compete, within their task and between tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._measures import flat, magnitude_bits, order_statistics
from eutectic.methods._method import Finite, Fraction, Method, Over, Site, Stats, chain
from eutectic.methods._transforms import scale_by, total

REFERENCE = "Du et al., Parameter competition balancing for model merging, NeurIPS 2024, arXiv:2410.02396"
#: candidates for a choice on validation data
GRID = {"scale": (0.8, 1.0, 1.2, 1.4, 1.6)}
#: share of the magnitudes that is clipped at either end
TAIL = 1e-4


def pcb(density: Fraction = 0.1, scale: Finite = 1.2, over: Over = "model") -> Method:
    """Weight each entry by how it stands out in its own task vector and how it agrees with the others.

        τ̂ₖ = τₖ with the outermost 10⁻⁴ of its magnitudes clipped,   nₖ = |τ̂ₖ| rescaled to [0, 1]
        βₖ = exp(K nₖ²) · tanh(τₖ Σⱼ τⱼ),   β̂ₖ = its top ``density``, rescaled to [0, 1],   θ = θ₀ + λ Σ β̂ₖ τ̂ₖ / Σ β̂ₖ

    Args:
        density: r, the share of each task vector's entries that compete; the authors' code has 0.05 and 0.1.  0 gives the base.
        scale: λ; the authors' code has 1.2.
        over: rank and rescale over the whole model, as the authors do, or tensor by tensor.

    Source: Du et al., NeurIPS 2024, arXiv:2410.02396, in the form of the authors' code (pcb-merging.py).  Differs, as that
    code does, from the paper's equations, whose softmax over all d entries is flat for large d; and from the code in that
    an entry against the common sign (βₖ ≤ 0) never gains a weight, that values which are all equal count as 1 instead of
    0/0, and that a tail of less than one entry clips none.
    """
    if density == 0:
        return Method(lambda x_K, site, stats: torch.zeros_like(x_K[0]))

    def tails(n_K: Tensor) -> Tensor:
        cut_K = (n_K.double() * TAIL).long()
        return torch.cat([n_K - cut_K, cut_K + 1]).clamp(min=1)

    def competing(n_K: Tensor) -> Tensor:
        kept_K = torch.clamp((n_K.double() * density).round(), min=1).long()
        return torch.cat([kept_K, torch.ones_like(kept_K)])

    def scores(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        return _scores(flat(x_K, site, stats), stats)

    measures = (
        *order_statistics(flat, tails, over, ("high tails", "tails")),
        *order_statistics(scores, competing, over, ("high scores", "scores")),
    )
    return chain(Method(_compete, measures=measures), scale_by(scale))


def _bounds(stat: Tensor) -> tuple[Tensor, Tensor]:
    least, most = stat.view(torch.float32).unflatten(0, (2, -1))[..., None]
    return least, most


def _clipped(x_K: Tensor, stats: Stats) -> Tensor:
    least, most = (bound.to(x_K.dtype) for bound in _bounds(stats["tails"]))
    return x_K.abs().clamp(least, most).copysign(x_K) * (x_K != 0)


def _scores(x_K: Tensor, stats: Stats) -> Tensor:
    """β ``[K, n]``, over the constant exp K so that it does not overflow, and 0 where negative; rounded from float64."""
    wide_K = x_K.double()
    least, most = (bound.double() for bound in _bounds(stats["tails"]))
    spread = torch.where(most > least, most - least, 1)
    standing_K = ((wide_K.abs().clamp(least, most) - least) / spread).square()
    return (torch.exp(len(x_K) * (standing_K - 1)) * torch.tanh(wide_K * total(wide_K))).clamp(min=0).float()


def _compete(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
    flat_K = x_K.reshape(len(x_K), -1)
    score_K = _scores(flat_K, stats)
    least, most = _bounds(stats["scores"])
    level_K = torch.where(most > least, (score_K - least) / torch.where(most > least, most - least, 1), 1)
    kept_K = (score_K > 0) & (magnitude_bits(score_K) >= magnitude_bits(least))
    weight_K = torch.where(kept_K, level_K, 0).to(x_K.dtype)
    weight = total(weight_K)
    merged = total(weight_K * _clipped(flat_K, stats)) / torch.where(weight > 0, weight, 1)
    return torch.where(weight > 0, merged, 0).view(x_K.shape[1:])
