"""Density reuse calibrated by the likelihood of inputs and labels together."""

from __future__ import annotations

from eutectic.ensemble._calibration import joint_loss, trained
from eutectic.ensemble._ensemble import Combination
from eutectic.methods._method import Count, Positive

REFERENCE = "Tang et al., Improving heterogeneous model reuse by density estimation, IJCAI 2023, arXiv:2305.13871"


def density_reuse_joint(steps: Count = 100, lr: Positive = 1e-4, batch_size: Count = 64) -> Combination:
    """Train the parties' models, classifiers and densities, to make shared labelled examples likely.

        L = −mean log Σₖ πₖ pₖ(x) pₖ(y | x)

    Args:
        steps: of Adam, one batch each.
        lr: Adam's.
        batch_size: drawn with replacement.

    Source: the model of Tang et al., IJCAI 2023, arXiv:2305.13871.  Differs from the paper in the loss, a
    proper score here.
    """
    return trained(joint_loss, steps, lr, batch_size)
