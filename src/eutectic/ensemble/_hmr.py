"""Heterogeneous model reuse by exchanging hard examples: the earlier method, to compare with.

Source: Wu, Liu and Zhou, "Heterogeneous model reuse via optimizing multiparty multiclass margin", ICML 2019.  Differs from
the paper in that examples are exchanged in rounds, after each of which a party trains for one epoch in which what it
received is repeated to a tenth of all, where the paper retrains after every example.  It needs the parties' data and their
patience, so it is no recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from eutectic.ensemble._party import Party
from eutectic.ensemble._predictions import Union
from eutectic.errors import LayoutError
from eutectic.task import Arrays

#: trains a party's classifier for one epoch, in place
Train = Callable[[nn.Module, Arrays], None]


def with_reserved(network: nn.Module) -> None:
    """Give the last linear layer one output more, the mean of the others: for inputs of none of the party's classes, in place.

    Raises LayoutError for a network that does not end in a linear layer.
    """
    *_, (name, last) = network.named_modules()
    if not isinstance(last, nn.Linear):
        raise LayoutError(f"a reserved class needs a network that ends in a linear layer, not in {type(last).__name__}")
    wider = nn.Linear(last.in_features, last.out_features + 1)
    with torch.no_grad():
        for new, old in zip(wider.parameters(), last.parameters(), strict=True):
            new.copy_(torch.cat([old, old.mean(0, keepdim=True)]))
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent).add_module(child, wider)


class Exchange:
    """Parties that train on while they exchange examples; ``shares`` are their own data, labelled among their own classes.

    ``train`` is how they do: for one epoch, in place.
    """

    def __init__(self, parties: Sequence[Party], union: Union, shares: Sequence[Arrays], seed: int, train: Train) -> None:
        """Every party gets a reserved class."""
        self.parties, self.union, self.shares, self.train = parties, union, shares, train
        self.generator = torch.Generator().manual_seed(seed)
        self.received: list[list[tuple[Tensor, int]]] = [[] for _ in parties]
        for party in parties:
            with_reserved(party.classifier.network)
            party.classifier.eval()

    @torch.no_grad()
    def log_p(self, inputs: Tensor) -> Tensor:
        """The parties' log-probabilities ``[K, B, C]``, without the reserved class."""
        found = []
        for k, party in enumerate(self.parties):
            said = torch.cat([party.classifier(batch).float().log_softmax(1)[:, :-1] for batch in inputs.split(512)])
            found.append(self.union.spread(k, said))
        return torch.stack(found)

    def predict(self, inputs: Tensor) -> Tensor:
        """The most certain party's, ``[B, C]``."""
        return self.log_p(inputs).amax(0)

    def round(self, n: int) -> None:
        """Look at ``n`` samples, drawn as the parties have them; those of a margin ≤ 0 go to the two parties that made it."""
        sizes = torch.tensor([float(len(share)) for share in self.shares])
        owners = torch.multinomial(sizes, n, replacement=True, generator=self.generator).tolist()
        drawn = [self.shares[k].take(torch.randint(len(self.shares[k]), (1,), generator=self.generator)) for k in owners]
        labels = torch.tensor([self.union.places[k][int(label)] for k, (_, label) in zip(owners, drawn, strict=True)])
        inputs = torch.cat([one for one, _ in drawn])
        right = self.log_p(inputs)
        wrong = right.clone()
        wrong[:, torch.arange(n), labels] = -torch.inf
        right = right[:, torch.arange(n), labels]  # [K, B]
        margin = right.amax(0) - wrong.amax(2).amax(0)
        for b in (margin <= 0).nonzero().flatten().tolist():
            for k in {int(right[:, b].argmax()), int(wrong.amax(2)[:, b].argmax())}:
                own = self.union.places[k]
                label = own.index(int(labels[b])) if int(labels[b]) in own else len(own)
                self.received[k].append((inputs[b], label))
        for party, share, got in zip(self.parties, self.shares, self.received, strict=True):
            if got:
                self._retrain(party, share, got)

    def _retrain(self, party: Party, share: Arrays, got: list[tuple[Tensor, int]]) -> None:
        repeat = max(1, len(share) // (10 * len(got)))
        inputs = torch.stack([one for one, _ in got]).repeat(repeat, *[1] * (share.inputs.ndim - 1))
        labels = torch.tensor([label for _, label in got]).repeat(repeat)
        together = Arrays(torch.cat([share.inputs, inputs]), torch.cat([share.labels, labels]))
        party.classifier.requires_grad_(True)
        self.train(party.classifier, together)
