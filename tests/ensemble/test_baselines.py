"""The earlier methods of model reuse: exchanges of hard examples, and kernel mean embeddings."""

import pytest
import torch
from tests.ensemble.parties import CLASSES, digits, parties
from torch import nn

from eutectic import errors
from eutectic.ensemble import _rkme
from eutectic.ensemble._ensemble import Ensemble
from eutectic.ensemble._hmr import Exchange, with_reserved
from eutectic.task import Arrays
from eutectic.tuning.trainer import Training, fine_tune


def shares():
    images, labels = digits("train")
    for classes in CLASSES.values():
        keep = torch.isin(labels, torch.tensor(classes))
        yield Arrays(images[keep], torch.searchsorted(torch.tensor(classes), labels[keep]))


def test_a_reserved_class_begins_as_the_mean_of_the_others():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before = network(x)
    with_reserved(network)
    torch.testing.assert_close(network(x), torch.cat([before, before.mean(1, keepdim=True)], 1))
    with pytest.raises(errors.LayoutError, match="ends in a linear layer, not in ReLU"):
        with_reserved(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))


def test_exchanges_mend_what_certainty_gets_wrong():
    union = Ensemble("max_ensemble", parties()).union

    def train(classifier, own):
        fine_tune(classifier, nn.Identity(), own, Training(steps=20, lr=3e-3, batch_size=128))

    exchange = Exchange(list(parties().values()), union, list(shares()), 0, train)
    images, labels = digits("test")
    before = (exchange.predict(images).argmax(1) == labels).float().mean()
    exchange.round(150)
    assert any(exchange.received)
    assert (exchange.predict(images).argmax(1) == labels).float().mean() > before + 0.05


def test_an_embedding_of_all_points_is_the_mean_embedding_and_finds_the_shares():
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(300, 2, generator=generator), torch.randn(300, 2, generator=generator) + 6
    embeddings = [_rkme.embed(near, 20), _rkme.embed(far, 20)]
    x = torch.randn(50, 2, generator=generator)
    torch.testing.assert_close(embeddings[0].at(x), _rkme.kernel(x, near).mean(1), atol=1e-2, rtol=0)
    mixed = torch.cat([near[:60], far[:240]])
    torch.testing.assert_close(_rkme.shares_of(embeddings, mixed), torch.tensor([0.2, 0.8]), atol=0.07, rtol=0)
    chosen = _rkme.route(embeddings, mixed)
    assert (chosen[:60] == 0).float().mean() > 0.95
    assert (chosen[60:] == 1).float().mean() > 0.95
