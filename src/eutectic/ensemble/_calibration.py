"""Multiparty calibration: what a few labelled examples that the parties share can mend.

N = examples, K = parties, C = classes of the union.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eutectic.checkpoint.save import Progress
from eutectic.ensemble._ensemble import Combination, Ensemble, Examples, Fitted, Outputs
from eutectic.ensemble._predictions import mixture
from eutectic.errors import NonFiniteError

#: the loss of a batch, of the parties' outputs, the labels ``[B]``, and which party knows which class ``[K, C]``
Loss = Callable[[Outputs, Tensor, Tensor], Tensor]


def joint(outputs: Outputs) -> Tensor:
    """Log Σₖ πₖ pₖ(x) pₖ(y | x), ``[B, C]``."""
    return mixture(outputs.log_weights_KB, outputs.log_p_KBC)


def of_labels(log_p_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The entries of the labels, ``[B]``."""
    return log_p_BC.gather(1, labels_B[:, None]).squeeze(1)


def trained(loss: Loss, steps: int, lr: float, batch_size: int) -> Combination:
    """Density reuse whose models, all of the parties', go on learning from the examples, by Adam."""

    def fit(ensemble: Ensemble, examples: Examples, seed: int, progress: Progress) -> Fitted:
        generator, known = torch.Generator().manual_seed(seed), ensemble.union.known
        ensemble.eval().requires_grad_(True)  # the statistics of batch norm stay those of a party's own data
        optimiser = torch.optim.Adam(ensemble.parameters(), lr=lr)
        for step in range(1, steps + 1):
            index = torch.randint(len(examples.labels), (batch_size,), generator=generator)
            found = loss(ensemble.outputs(examples.inputs[index]), examples.labels[index], known)
            if not torch.isfinite(found):
                raise NonFiniteError(f"{ensemble.method}: the loss of step {step} is {found.item()}; lower lr ({lr})")
            optimiser.zero_grad()
            found.backward()
            optimiser.step()
            progress(ensemble.method, step, steps)
        return {}

    return Combination(lambda outputs, fitted: joint(outputs), fit, densities=True)


def published_loss(outputs: Outputs, labels: Tensor, known: Tensor) -> Tensor:
    """−mean H(x, y) − mean Σₖ 1[y ∈ Yₖ] rₖ(x), with rₖ the log-density relative to the highest.

    H has probabilities, not their logarithms, and weights through which no gradient goes: it trains the classifiers alone.
    """
    r_KB = outputs.log_weights_KB - outputs.log_weights_KB.amax(0)
    weights = r_KB.detach().exp()
    right = torch.stack([of_labels(log_p, labels) for log_p in outputs.log_p_KBC]).exp()
    return -(weights * right).sum(0).mean() - (r_KB * known[:, labels]).sum(0).mean()


def joint_loss(outputs: Outputs, labels: Tensor, known: Tensor) -> Tensor:
    """−mean log p(x, y): a proper score, which trains classifiers and densities together."""
    return -of_labels(joint(outputs), labels).mean()


def posterior_loss(outputs: Outputs, labels: Tensor, known: Tensor) -> Tensor:
    """−mean log p(y | x): the cross-entropy of what is predicted."""
    return -of_labels(joint(outputs).log_softmax(1), labels).mean()


def tempered(outputs: Outputs, log_priors_K: Tensor, exponent: Tensor, bias_K: Tensor) -> Outputs:
    """The outputs with log πₖ + β log pₖ(x) + bₖ in place of log πₖ + log pₖ(x)."""
    priors = log_priors_K.to(outputs.log_weights_KB)[:, None]
    weights = priors + exponent * (outputs.log_weights_KB - priors) + bias_K[:, None]
    return Outputs(outputs.log_p_KBC, weights)


def fit_tempering(outputs: Outputs, labels: Tensor, log_priors_K: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """β > 0 and b ``[K]`` that minimise Σ_n −log p(yₙ | xₙ) + strength · (log² β + ‖b‖²) / 2, by L-BFGS from β = 1, b = 0.

    The penalty is a normal prior around doing nothing: few examples move little.
    """
    outputs = Outputs(outputs.log_p_KBC.double(), outputs.log_weights_KB.double())
    priors = log_priors_K.double()
    log_exponent = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(priors), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_exponent, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = posterior_loss(tempered(outputs, priors, log_exponent.exp(), bias), labels, torch.empty(0)) * len(labels)
        loss = loss + 0.5 * strength * (log_exponent**2 + (bias**2).sum())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(objective)
    return log_exponent.detach().exp().float(), bias.detach().float()
