"""Parties on small real data: the optical digits of `mini`, split by class and by share."""

import functools

import torch
from torch import nn

from eutectic.bench import zoo
from eutectic.ensemble._density import Cosines
from eutectic.ensemble._gaussians import Gaussians
from eutectic.ensemble._networks import CNN, MLP, Normalisation
from eutectic.ensemble._party import About, Party, learn_density
from eutectic.task import Arrays
from eutectic.tuning.trainer import Training, fine_tune

#: overlapping label sets, of the digits' names
CLASSES = {"one": (0, 1, 2, 3, 4), "two": (4, 5, 6, 7), "three": (7, 8, 9)}
NETWORKS = {"one": MLP(widths=(32,)), "two": CNN(channels=(8,), hidden=16, dropout=0.0), "three": MLP(widths=(16, 16))}


@functools.cache
def digits(split):
    """Images ``[N, 1, 8, 8]`` in 0 … 1, and labels."""
    held = zoo.open_suite("mini").arrays("digits8", split)
    return held.inputs.permute(0, 3, 1, 2)[:, :1].float() / 255, held.labels


def about_of(name, **changes):
    classes = CLASSES[name]
    _, labels = digits("train")
    counts = tuple(int((labels == c).sum()) for c in classes)
    said = {"density": Gaussians(components=2, floor=0.2), "space": Cosines(size=6), "counts": counts} | changes
    return About(
        classes=tuple(f"digit {c}" for c in classes),
        shape=(1, 8, 8),
        classifier=NETWORKS[name],
        normalisation=Normalisation(mean=(0.3,), std=(0.4,)),
        **said,
    )


@functools.cache
def _tensors(name):
    """What a party learns, once: the states of its classifier and its density."""
    about, (images, labels) = about_of(name), digits("train")
    keep = torch.isin(labels, torch.tensor(CLASSES[name]))
    own = torch.searchsorted(torch.tensor(CLASSES[name]), labels[keep])
    torch.manual_seed(0)
    classifier = about.network()
    fine_tune(classifier, nn.Identity(), Arrays(images[keep], own), Training(steps=60, lr=1e-2, batch_size=64))
    return classifier.network.state_dict(), learn_density(about, images[keep], own)


def party(name):
    """A fresh copy of a party."""
    about = about_of(name)
    state, density = _tensors(name)
    classifier = about.network().eval()
    classifier.network.load_state_dict(state)
    copy = type(density)(*density.means.shape)
    copy.load_state_dict(density.state_dict())
    return Party(about, classifier, copy.eval())


def parties():
    """All three."""
    return {name: party(name) for name in CLASSES}
