"""Heterogeneous model reuse by density estimation: who knows an input decides what it is."""

from __future__ import annotations

from eutectic.ensemble._ensemble import Combination
from eutectic.ensemble._predictions import mixture

REFERENCE = "Tang et al., Improving heterogeneous model reuse by density estimation, IJCAI 2023, arXiv:2305.13871"


def density_reuse() -> Combination:
    """Predict by the joint density that the parties' models amount to, without any exchange of samples.

        p(x, y) = Σₖ πₖ pₖ(x) pₖ(y | x),      ŷ(x) = argmax_y p(x, y)

    with πₖ each party's share of all samples, pₖ(x) its density model and pₖ(y | x) its classifier, 0 for classes that it does
    not know.  If the models are exact it is the Bayes classifier of all data together.

    Source: Tang et al., IJCAI 2023, arXiv:2305.13871.  Differs from the paper's code in that it is computed in log space
    throughout, and an input with no density under any party is judged by the priors.  Raises CheckpointError for a party
    without a density, or densities in different spaces, NonFiniteError for a log-density that is NaN or +∞.
    """
    return Combination(lambda outputs, fitted: mixture(outputs.log_weights_KB, outputs.log_p_KBC), densities=True)
