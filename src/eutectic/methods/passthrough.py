"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from eutectic.methods._method import Finite, Method
from eutectic.methods._transforms import weighted_sum

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257"


def passthrough(scale: Finite = 1.0) -> Method:
    """Hand one expert's weights on, for recipes that stack layers of several models.

        θ = λ θ₁

    Takes exactly one expert and no base (given one, it is ignored).

    Args:
        scale: λ, of the weights themselves; 0 silences a tensor.

    Source: the method ``passthrough`` of mergekit (Goddard et al., 2024, arXiv:2403.13257).  Does not differ from it.
    """
    return weighted_sum(scale)._replace(space="weight", experts=(1, 1))
