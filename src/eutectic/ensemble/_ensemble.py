"""Parties' networks as one: each predicts over its own labels, and a rule combines what they say.

K = parties, B = samples, C = classes of the union, ``*shape`` = an input in the form that the parties share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eutectic import registry
from eutectic.checkpoint.save import Progress, silent
from eutectic.ensemble._party import Party, require_comparable
from eutectic.ensemble._predictions import Union, require_numbers, union_of, weigh
from eutectic.errors import TaskError
from eutectic.methods._method import validated


class Examples(NamedTuple):
    """Labelled examples that the parties share: inputs ``[N, *shape]``, labels ``[N]`` as places in the union of classes."""

    inputs: Tensor
    labels: Tensor


class Outputs(NamedTuple):
    """What parties say of a batch: log p_k(y | x) ``[K, B, C]`` and log π_k p_k(x) ``[K, B]``, or log π_k without densities."""

    log_p_KBC: Tensor
    log_weights_KB: Tensor


Fitted = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Combination:
    """A rule with its parameters bound.

    ``combine`` gives log p(y | x) ``[B, C]``, up to a constant for each sample.  ``fit``, of a rule that has one, learns small
    tensors for it from examples, and may go on training the parties' models, in place.  ``densities``: whether it asks who
    knows an input; ``tensors``: the names of what ``combine`` needs fitted.
    """

    combine: Callable[[Outputs, Fitted], Tensor]
    fit: Callable[[Ensemble, Examples, int, Progress], Fitted] | None = None
    densities: bool = False
    tensors: tuple[str, ...] = ()


class Ensemble(nn.Module):
    """Inputs ``[B, *shape]`` → log p(y | x) ``[B, C]`` over the union of the parties' classes, in evaluation mode."""

    def __init__(
        self,
        method: str,
        parties: Mapping[str, Party],
        parameters: Mapping[str, Any] | None = None,
        fitted: Fitted | None = None,
    ) -> None:
        """Bind a registered rule to parties by name.

        Raises UnknownNameError, ParameterError, TaskError without parties, CheckpointError for parties that do not fit.
        """
        super().__init__()
        if not parties:
            raise TaskError(f"{method}: no parties were given; name at least 1")
        self.method, self.parties = method, dict(parties)
        self.settings = validated(method, parameters or {})
        self.rule: Combination = registry.get("ensemble", method)(**self.settings)
        names, members = list(parties), list(parties.values())
        require_comparable(members, names, densities=self.rule.densities)
        self.union: Union = union_of([party.about.classes for party in members])
        self.fitted = dict(fitted or {})
        self.classifiers = nn.ModuleList(party.classifier for party in members)
        self.densities = nn.ModuleList(p.density for p in members if p.density is not None and self.rule.densities)
        self.eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """What the places of an output mean."""
        return self.union.classes

    @property
    def log_priors(self) -> Tensor:
        """Log π_k: each party's share of all samples, ``[K]``."""
        return torch.tensor([float(sum(party.about.counts)) for party in self.parties.values()]).log().log_softmax(0)

    def outputs(self, inputs: Tensor) -> Outputs:
        """What the parties say.  Raises TaskError for inputs of another shape, NonFiniteError naming the party."""
        shape = next(iter(self.parties.values())).about.shape
        if tuple(inputs.shape[1:]) != shape:
            raise TaskError(f"{self.method}: inputs are [B, {', '.join(map(str, shape))}], not {list(inputs.shape)}")
        members, names = list(self.parties.values()), list(self.parties)
        spread = [self.union.spread(k, party.log_predictions(inputs)) for k, party in enumerate(members)]
        log_p = torch.stack(spread)
        require_numbers(log_p, names)
        log_weights = self.log_priors[:, None].expand(-1, len(inputs))
        if self.rule.densities:
            log_weights = weigh(self.log_priors, torch.stack([party.log_density(inputs) for party in members]), names)
        return Outputs(log_p, log_weights)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class.  Raises TaskError if the rule has yet to be fitted."""
        if not set(self.rule.tensors) <= self.fitted.keys():
            raise TaskError(
                f"{self.method} has not been fitted, or what it was fitted to is missing: give `examples`, fit anew"
            )
        return self.rule.combine(self.outputs(inputs), self.fitted).log_softmax(1)

    def fit(self, examples: Examples | None, seed: int = 0, progress: Progress = silent) -> None:
        """Learn from labelled examples what the rule learns; parties' models may be trained on, in place.

        Raises TaskError if the rule needs examples and there are none, or if it learns nothing and there are some.
        """
        if self.rule.fit is None:
            if examples is not None:
                raise TaskError(f"{self.method} learns nothing from labelled examples: leave out `examples`")
            return
        if examples is None or not len(examples.labels):
            raise TaskError(f"{self.method} is fitted to labelled examples that the parties share: give `examples`")
        self.fitted = dict(self.rule.fit(self, examples, seed, progress))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def draw(self, n: int, seed: int = 0) -> Tensor:
        """Inputs ``[n, *shape]`` that nobody had: of parties by their shares, each from its density.

        Raises CheckpointError for a party without density.
        """
        generator = torch.Generator().manual_seed(seed)
        counts = torch.multinomial(self.log_priors.exp(), n, replacement=True, generator=generator).bincount(
            minlength=len(self.parties)
        )
        drawn = [party.draw(int(count), generator) for party, count in zip(self.parties.values(), counts, strict=True)]
        return torch.cat(drawn)[torch.randperm(n, generator=generator)]

    @torch.no_grad()
    def outputs_of(self, inputs: Tensor, batch_size: int = 512) -> Outputs:
        """``outputs`` of many inputs, without gradients."""
        found = [self.outputs(batch) for batch in inputs.split(batch_size)]
        return Outputs(torch.cat([one.log_p_KBC for one in found], 1), torch.cat([one.log_weights_KB for one in found], 1))
