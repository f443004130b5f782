"""The most certain party decides."""

from __future__ import annotations

from eutectic.ensemble._ensemble import Combination
from eutectic.ensemble._predictions import maximum

REFERENCE = "Wu, Liu and Zhou, Heterogeneous model reuse via optimizing multiparty multiclass margin, ICML 2019"


def max_ensemble() -> Combination:
    """The class to which any party gives the highest probability; the max-model predictor of heterogeneous model reuse.

        ŷ(x) = argmax_y max_k pₖ(y | x)

    A party that has never seen the like of x may still be certain, so it goes wrong where label sets are disjoint.
    Source: Wu, Liu and Zhou, ICML 2019.
    """
    return Combination(lambda outputs, fitted: maximum(outputs.log_p_KBC))
