"""A weighted mean of the parties' predictions, the weights fitted to labelled examples."""

from __future__ import annotations

from eutectic.checkpoint.save import Progress
from eutectic.ensemble._ensemble import Combination, Ensemble, Examples, Fitted
from eutectic.ensemble._predictions import fit_weights, mixture

REFERENCE = "Jacobs, Methods for combining experts' probability assessments, Neural Computation 7(5), 1995"


def weighted_ensemble() -> Combination:
    """The mixture of the parties under which shared labelled examples are most likely; one weight for each party.

        p(y | x) = Σₖ wₖ pₖ(y | x),     w = argmax Σ_b log Σₖ wₖ pₖ(y_b | x_b)

    Source: the linear opinion pool with weights by maximum likelihood, in Jacobs, 1995.  Differs from the source in that the
    label sets may overlap or be disjoint.  Raises TaskError for an example whose label every party rules out.
    """

    def fit(ensemble: Ensemble, examples: Examples, seed: int, progress: Progress) -> Fitted:
        return {"log_weights": fit_weights(ensemble.outputs_of(examples.inputs).log_p_KBC, examples.labels)}

    return Combination(lambda outputs, fitted: mixture(fitted["log_weights"], outputs.log_p_KBC), fit, tensors=("log_weights",))
