"""The papers' equations, written down once more: float64, whole tensors, sorts and loops; nothing shared with the package.

A model is a dict of tensors; each function gives the merged model in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def random_model(seed, grid=False, scale=1.0):
    """Several tensors; on the grid all values are sixteenths: sums are exact, and magnitudes tie."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (37, 11), "b": (64,), "c": (3, 5, 7), "d": (), "e": (1,), "f": (50, 40)}
    model = {name: scale * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return {name: (tensor * 4).round() / 16 for name, tensor in model.items()} if grid else model


def fine_tunes(base, k, seed=100, grid=False):
    """Experts that leave about a third of the entries, and the whole of tensor ``b`` of the last, as they were."""
    random = torch.Generator().manual_seed(seed)
    experts = []
    for i in range(k):
        change = random_model(seed + 1 + i, grid, 0.5)
        expert = {}
        for name, tensor in base.items():
            touched = torch.rand(tensor.shape, generator=random) < 0.67
            expert[name] = tensor + change[name] * touched
        if i == k - 1:
            expert["b"] = base["b"].clone()
        experts.append(expert)
    return experts


def wide(model):
    return {name: tensor.double() for name, tensor in model.items()}


def task_vectors(base, experts):
    """τ as float32 holds it: what "the largest magnitudes" are is decided there."""
    return [{name: (expert[name] - base[name]).double() for name in base} for expert in experts]


def average(experts, weights=None):
    weights = [1.0] * len(experts) if weights is None else weights
    total = math.fsum(weights)
    return {name: sum(w * e[name].double() for w, e in zip(weights, experts, strict=True)) / total for name in experts[0]}


def task_arithmetic(base, experts, scale, weights=None):
    weights = [1.0] * len(experts) if weights is None else weights
    merged = wide(base)
    for weight, tau in zip(weights, task_vectors(base, experts), strict=True):
        for name in merged:
            merged[name] = merged[name] + scale * weight * tau[name]
    return merged


def ties(base, experts, density, scale, over):
    taus = [_trimmed(tau, density, over) for tau in task_vectors(base, experts)]
    merged = {}
    for name, tensor in wide(base).items():
        flat = [tau[name].reshape(-1).tolist() for tau in taus]
        update = []
        for values in zip(*flat, strict=True):
            mass = math.fsum(values)
            agreeing = [v for v in values if v != 0 and v * mass > 0]
            update.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
        merged[name] = tensor + scale * torch.tensor(update, dtype=torch.float64).view(tensor.shape)
    return merged


def _trimmed(tau, density, over):
    """Keep what is at least as large as the ⌈density · N⌋-th largest, counted in a tensor or in the whole model."""
    if over == "model":
        threshold = dict.fromkeys(tau, _threshold(torch.cat([t.reshape(-1) for t in tau.values()]), density))
    else:
        threshold = {name: _threshold(t.reshape(-1), density) for name, t in tau.items()}
    return {name: torch.where(t.abs() >= threshold[name], t, 0.0) for name, t in tau.items()}


def _threshold(values, density):
    if density == 0:
        return math.inf
    ordered = sorted(values.abs().tolist(), reverse=True)
    return ordered[max(1, round(density * len(ordered))) - 1]


def dare(base, experts, density, scale, coin):
    """``coin(name, k, n)`` gives n numbers in [0, 1)."""
    merged = wide(base)
    for k, tau in enumerate(task_vectors(base, experts)):
        for name, t in tau.items():
            keep = torch.from_numpy(np.asarray(coin(name, k, t.numel())) < density).view(t.shape)
            merged[name] = merged[name] + scale * torch.where(keep, t / density, 0.0)
    return merged


def slerp(first, second, t):
    return {name: slerp_tensor(first[name], second[name], t) for name in first}


def slerp_tensor(first, second, t):
    """By Kahan's angle 2·atan2(‖u − v‖, ‖u + v‖), accurate also where the two are nearly (anti)parallel."""
    a, b = first.double(), second.double()
    na, nb = float(a.norm()), float(b.norm())
    if na == 0 or nb == 0:
        return (1 - t) * a + t * b
    u, v = a / na, b / nb
    omega = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if math.sin(omega) < 1e-6:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)
