"""The mean of the parties' predictions."""

from __future__ import annotations

from eutectic.ensemble._ensemble import Combination
from eutectic.ensemble._predictions import mixture

REFERENCE = "Hansen and Salamon, Neural network ensembles, IEEE TPAMI 12(10), 1990"


def mean_ensemble() -> Combination:
    """Every party has the same say, on every input.

        p(y | x) = 1/K Σₖ pₖ(y | x)

    A class that a party does not know gets nothing from it.  Source: Hansen and Salamon, 1990.  Differs from the paper in that
    the label sets may overlap or be disjoint.
    """
    return Combination(lambda outputs, fitted: mixture(outputs.log_p_KBC.new_zeros(len(outputs.log_p_KBC)), outputs.log_p_KBC))
