"""Density reuse with a temperature on the densities, and a bias for each party, fitted to labelled examples."""

from __future__ import annotations

from torch import Tensor

from eutectic.checkpoint.save import Progress
from eutectic.ensemble._calibration import fit_tempering, joint, tempered
from eutectic.ensemble._ensemble import Combination, Ensemble, Examples, Fitted, Outputs
from eutectic.methods._method import Positive

REFERENCE = "Tang et al., Improving heterogeneous model reuse by density estimation, IJCAI 2023, arXiv:2305.13871"


def density_reuse_tempered(strength: Positive = 10.0) -> Combination:
    """Keep the parties' models, and learn how far their densities are to be trusted.

        p(y | x) ∝ Σₖ πₖ exp(bₖ) pₖ(x)^β pₖ(y | x),      min over β, b of  Σₙ −log p(yₙ | xₙ) + s (log² β + ‖b‖²) / 2

    Log-densities of images differ by tens or hundreds of nats, so the weights are all but one-hot: too certain where a density
    is wrong.  β < 1 says so.  With few examples the penalty holds β at 1 and b at 0, which is density reuse as it is.

    Args:
        strength: s, the number of nats for which an e-fold of β or a nat of bias has to be worth it, doubled.

    Source: the model of Tang et al., IJCAI 2023, arXiv:2305.13871; the temperature is ours, after Guo et al., ICML 2017,
    arXiv:1706.04599, who temper logits.  Differs from the paper in that no party's model changes.
    """

    def fit(ensemble: Ensemble, examples: Examples, seed: int, progress: Progress) -> Fitted:
        outputs, priors = ensemble.outputs_of(examples.inputs), ensemble.log_priors
        exponent, bias = fit_tempering(outputs, examples.labels, priors, strength)
        return {"exponent": exponent, "bias": bias, "log_priors": priors}

    def combine(outputs: Outputs, fitted: Fitted) -> Tensor:
        return joint(tempered(outputs, fitted["log_priors"], fitted["exponent"], fitted["bias"]))

    return Combination(combine, fit, densities=True, tensors=("exponent", "bias", "log_priors"))
