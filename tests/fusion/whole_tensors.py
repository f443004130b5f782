"""A small network that has what is awkward, its fine-tunes and their tasks: for the methods that end in whole tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from eutectic.checkpoint.base import Memory
from eutectic.fusion import _api
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.merge.api import state_dict
from eutectic.task import Task

NAMES = ("a", "b", "c")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)) * self.gate(x))


class Tiny(nn.Module):
    """``[B, T, 6]`` → ``[B, 5]``, its last layer made first, with buffers and a frozen one; blocks 0 and 2 share ``up``."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.norm = nn.Linear(8, 5), nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.frozen = nn.Parameter(torch.rand(8) + 0.5, requires_grad=False)
        self.layer = nn.ModuleList(Block() for _ in range(3))
        self.layer[2].up.weight = self.layer[0].up.weight

    def forward(self, x):
        x = self.norm((self.first(x) * self.frozen).transpose(1, 2)).transpose(1, 2)
        for block in self.layer:
            x = block(x)
        return self.last(x).mean(1)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Tiny().to(dtype).eval()


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(make, seed):
    """A fine-tune of ``make()``: every floating-point tensor moves, tied ones together."""
    module, random = make(), torch.Generator().manual_seed(seed)
    seen = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.dtype.is_floating_point and id(tensor) not in seen:
            seen[id(tensor)] = tensor
            tensor.data += 0.2 * torch.rand(tensor.shape, generator=random, dtype=tensor.dtype)
    return weights(module)


def models(make=network, names=NAMES):
    """The set, and the experts' tensors as they are: ModelSet, {name: dict}."""
    experts = {name: changed(make, seed) for seed, name in enumerate(names, start=1)}
    base = make()
    return ModelSet(make(), Memory(weights(base)), {name: Memory(expert) for name, expert in experts.items()}), experts


def task(name, n=12, shape=(4, 6), classes=4, width=5, dtype=torch.float64, gain=3.0, features=None):
    """Its inputs are in ``adapt`` without meaning; the head is a fixed random matrix times ``gain``."""
    random = torch.Generator().manual_seed(sum(name.encode()))
    x = torch.randn(n, *shape, generator=random, dtype=dtype) if features is None else features
    head = gain * torch.randn(classes, width, generator=random, dtype=dtype)
    return Task(name, lambda y: y @ head.T, adapt=(x, torch.zeros(len(x), dtype=torch.long)))


def tasks(names=NAMES, **options):
    return [task(name, **options) for name in names]


def fitted(method, given, of, **parameters):
    """The merged tensors, and the artefact."""
    artefact = _api.fit(method, given, of, parameters, Run())
    return state_dict(_api.fused(given.base, given.experts, artefact)), artefact


def average(experts):
    return {name: sum(expert[name] for expert in experts.values()) / len(experts) for name in next(iter(experts.values()))}
