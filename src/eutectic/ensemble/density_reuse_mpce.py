"""Density reuse calibrated by the loss that was published with it."""

from __future__ import annotations

from eutectic.ensemble._calibration import published_loss, trained
from eutectic.ensemble._ensemble import Combination
from eutectic.methods._method import Count, Positive

REFERENCE = "Tang et al., Improving heterogeneous model reuse by density estimation, IJCAI 2023, arXiv:2305.13871"


def density_reuse_mpce(steps: Count = 100, lr: Positive = 1e-5, batch_size: Count = 64) -> Combination:
    """Train the parties' models on shared labelled examples, by the authors' multiparty cross-entropy.

        L = −mean H(x, y) − mean Σₖ 1[y ∈ Yₖ] rₖ(x),    rₖ = log πₖ pₖ(x) − maxⱼ log πⱼ pⱼ(x),    H = Σₖ exp(rₖ) pₖ(y | x)

    It is no proper score: it is kept to compare with, see ``density_reuse_joint`` and ``density_reuse_tempered``.

    Args:
        steps: of Adam, one batch each.
        lr: Adam's.
        batch_size: drawn with replacement.

    Source: Tang et al., IJCAI 2023, arXiv:2305.13871, as its code computes it.  Differs from the code in that batch norm and
    dropout stay as in evaluation, and in that π is part of r.
    """
    return trained(published_loss, steps, lr, batch_size)
