"""Arcee Fusion: adopt only those changes of a second model that stand out."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods._measures import order_statistics
from eutectic.methods._method import Method, Scope, Site, Stats

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257 (arcee_fusion, 2025)"


def arcee_fusion() -> Method:
    """Take from the second expert the entries whose change from the first is important, and the rest from the first.

        s[i, j] = |θ₂ − θ₁|[i, j] · KL(softmax θ₂[i] ‖ softmax θ₁[i]),   θ = θ₂ where s ≥ Q₂ + 1.5 (Q₃ − Q₁), θ₁ elsewhere

    with i the rows (all but the first axis are in one) and Q₁, Q₂, Q₃ the quartiles of s in the tensor.  Takes exactly two
    experts; a base is ignored: the first expert is what the method calls the base.  Where the threshold is 0, as in tensors
    with no more than one entry a row, all of the second is taken.

    Source: mergekit's ``arcee_fusion`` (2025; library: Goddard et al., 2024, arXiv:2403.13257); there is no paper.  Differs
    from it in that the quartiles of large tensors are exact (mergekit: those of an unseeded sample of 10⁶), the divergence
    is exact (mergekit adds 10⁻⁸ to the probabilities), and a filter of a convolution is one row.
    """
    measures = order_statistics(lambda x_K, site, stats: _importance(x_K).flatten()[None], _quartiles, "tensor")

    def apply(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
        q1, q2, q3 = stats["threshold"].view(torch.float32).double()
        return torch.where(_importance(x_K).double() >= q2 + 1.5 * (q3 - q1), x_K[1], x_K[0])

    return Method(apply, Scope.ROW, measures, space="weight", experts=(2, 2))


def _quartiles(n_Q: Tensor) -> Tensor:
    """Ranks from the top of the entries ⌊(N − 1) / 4⌋, ⌊(N − 1) / 2⌋ and ⌊3 (N − 1) / 4⌋ in rising order."""
    n = n_Q.expand(3)
    return torch.clamp(n - (n - 1) * torch.tensor([1, 2, 3]) // 4, min=1)


def _importance(x_K: Tensor) -> Tensor:
    """``[2, rows, n]`` → ``[rows, n]``, rounded from float64."""
    first, second = x_K.double()
    log_p, log_q = second.log_softmax(1), first.log_softmax(1)
    ratio = log_p - log_q
    # Σ p log(p / q) − p + q: each term is at least 0, so nothing cancels when the rows are close
    kl = (log_p.exp() * (torch.expm1(-ratio) + ratio)).sum(1, keepdim=True)
    return ((second - first).abs() * kl).clamp(min=0, max=torch.finfo(torch.float32).max).float()
