"""Rules that combine predictions: pure functions over log-probabilities of several parties.

K = parties, B = samples, C = classes in the union of all label sets.  A party's log-probability of a class that it does not
know is −∞, so nothing else is needed to say which labels it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eutectic.errors import NonFiniteError, TaskError


class Union(NamedTuple):
    """All classes that some party knows, sorted, and at which place in it each party's own classes are."""

    classes: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]

    @property
    def known(self) -> Tensor:
        """Which party knows which class, ``[K, C]``."""
        known = torch.zeros(len(self.places), len(self.classes), dtype=torch.bool)
        for party, places in zip(known, self.places, strict=True):
            party[list(places)] = True
        return known

    def spread(self, party: int, log_p_Bc: Tensor) -> Tensor:
        """Log-probabilities of a party over its own classes as ``[B, C]`` over the union, −∞ where it knows nothing."""
        whole = log_p_Bc.new_full((len(log_p_Bc), len(self.classes)), -torch.inf)
        return whole.index_copy(1, torch.tensor(self.places[party]), log_p_Bc)


def union_of(classes: Sequence[Sequence[str]]) -> Union:
    """The union of label sets, which may overlap or be disjoint.  Raises TaskError for a party with none, or with one twice."""
    for party, own in enumerate(classes):
        if not own or len(set(own)) < len(own):
            raise TaskError(f"party {party}: its classes are {list(own)}: name at least one, and each once")
    whole = tuple(sorted({name for own in classes for name in own}))
    place = {name: at for at, name in enumerate(whole)}
    return Union(whole, tuple(tuple(place[name] for name in own) for own in classes))


def maximum(log_p_KBC: Tensor) -> Tensor:
    """The most certain party decides: log max_k p_k(y | x), ``[B, C]``; it is not normalised."""
    return log_p_KBC.amax(0)


def mixture(log_weights: Tensor, log_p_KBC: Tensor) -> Tensor:
    """Log Σ_k w_k p_k(y | x), ``[B, C]``, for log-weights ``[K]``, or ``[K, B]`` where they depend on the sample.

    With equal weights it is the mean ensemble; with w_k = π_k p_k(x) it is the joint density of heterogeneous model reuse.
    """
    shape = (len(log_weights), -1, 1)
    return (log_weights.view(shape) + log_p_KBC).logsumexp(0)


def require_numbers(log_p_KBC: Tensor, names: Sequence[str]) -> None:
    """Raise NonFiniteError, naming the party, for predictions that are NaN or +∞, or are 0 for every class."""
    for name, log_p in zip(names, log_p_KBC, strict=True):
        top = log_p.amax(1)  # NaN wins
        if not torch.isfinite(top).all():
            bad = int((~torch.isfinite(top)).sum())
            raise NonFiniteError(
                f"party {name!r}: its predictions for {bad} of {len(top)} samples are no numbers; check its weights"
            )


def weigh(log_prior_K: Tensor, log_density_KB: Tensor, names: Sequence[str]) -> Tensor:
    """Log π_k p_k(x), ``[K, B]``; a sample whose density is 0 under every party is weighed by the priors alone.

    Raises NonFiniteError, naming the party, for a log-density that is NaN or +∞.
    """
    for name, row in zip(names, log_density_KB, strict=True):
        bad = int((row.isnan() | (row == torch.inf)).sum())
        if bad:
            raise NonFiniteError(
                f"party {name!r}: its log-density of {bad} of {len(row)} samples is NaN or +∞; check its density"
            )
    nowhere = (log_density_KB == -torch.inf).all(0)
    return log_prior_K[:, None] + log_density_KB.masked_fill(nowhere, 0.0)


def fit_weights(log_p_KBC: Tensor, labels_B: Tensor, steps: int = 1000, tolerance: float = 1e-10) -> Tensor:
    """Log-weights ``[K]`` of the mixture that makes held-out labels most likely: max Σ_b log Σ_k w_k p_k(y_b | x_b).

    By expectation maximisation (Dempster, Laird and Rubin, 1977) from equal weights: the likelihood is concave in w, and no
    step lowers it.  A label that a party does not know counts against it, as do labels to which it gives little.
    Raises TaskError if no party gives any probability to a label.
    """
    log_p_KB = log_p_KBC.double().gather(2, labels_B.expand(len(log_p_KBC), -1)[..., None]).squeeze(2)
    impossible = (log_p_KB == -torch.inf).all(0)
    if impossible.any():
        raise TaskError(f"{int(impossible.sum())} of {len(labels_B)} labelled examples have a label that every party rules out")
    log_w = log_p_KB.new_full((len(log_p_KB), 1), 1 / len(log_p_KB)).log()
    before = -torch.inf
    for _ in range(steps):
        joint = log_w + log_p_KB
        now = joint.logsumexp(0).mean().item()
        log_w = joint.log_softmax(0).logsumexp(1, keepdim=True) - torch.tensor(float(len(labels_B))).log()
        if now - before < tolerance:
            break
        before = now
    return log_w.squeeze(1).to(log_p_KBC.dtype)
