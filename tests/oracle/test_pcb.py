"""PCB-Merging against the authors' procedure, sorted and looped over in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.merge.api import merge, state_dict


def pcb(taus, density):
    """One vector an expert, as lists of floats."""
    k, n = len(taus), len(taus[0])
    if density == 0:
        return [0.0] * n
    cut = int(1e-4 * n)
    clipped, weights = [], []
    for tau in taus:
        ordered = sorted(abs(v) for v in tau)
        low, high = ordered[cut], ordered[n - 1 - cut]
        size = [min(max(abs(v), low), high) for v in tau]
        clipped.append([math.copysign(s, v) if v else 0.0 for s, v in zip(size, tau, strict=True)])
        scores = []
        for i, s in enumerate(size):
            standing = (s - low) / (high - low) if high > low else 0.0
            agreement = math.tanh(tau[i] * sum(other[i] for other in taus))
            scores.append(max(0.0, math.exp(k * (standing**2 - 1)) * agreement))
        scores = torch.tensor(scores).tolist()  # as float32 holds them
        ordered = sorted(scores, reverse=True)
        least, most = ordered[max(1, round(density * n)) - 1], ordered[0]
        weights.append([0.0 if s <= 0 or s < least else (s - least) / (most - least) if most > least else 1.0 for s in scores])
    merged = []
    for i in range(n):
        total = sum(w[i] for w in weights)
        merged.append(sum(w[i] * c[i] for w, c in zip(weights, clipped, strict=True)) / total if total else 0.0)
    return merged


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("density", [0, 0.05, 0.4, 1])
@pytest.mark.parametrize("over", ["model", "tensor"])
@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
def test_pcb(k, density, over, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, k, grid=grid)
    taus = [{name: tau[name].reshape(-1).tolist() for name in base} for tau in naive.task_vectors(base, experts)]
    if over == "model":
        merged = iter(pcb([[v for name in base for v in tau[name]] for tau in taus], density))
        updates = {name: [next(merged) for _ in taus[0][name]] for name in base}
    else:
        updates = {name: pcb([tau[name] for tau in taus], density) for name in base}
    wanted = {
        name: t.double() + 1.5 * torch.tensor(updates[name], dtype=torch.float64).view(t.shape) for name, t in base.items()
    }
    found = state_dict(merge("pcb", base, experts, density=density, over=over, scale=1.5))
    assert_close(found, wanted, 1e-5)


def authors(taus_K, ratio):
    """pcb-merging.py, condensed."""

    def rescaled(x):
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        return (x - low) / (high - low)

    def clamped(x, below, above):
        ordered, n = x.sort(1).values, x.shape[1]
        return x.clamp(ordered[:, int(n * below)][:, None], ordered[:, int(n * (1 - above) - 1)][:, None])

    size = clamped(taus_K.abs(), 1e-4, 1e-4)
    score = torch.exp(len(taus_K) * rescaled(size) ** 2) * torch.tanh(taus_K * taus_K.sum(0))
    scale = rescaled(clamped(score, 1 - ratio, 0))
    return (taus_K.sign() * size * scale).sum(0) / scale.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_authors_code(k, ratio, size):
    n = 30_000  # a tail of exactly 3
    taus_K = size * torch.randn(k, n, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    experts = [{"a": tau[:10_000], "b": tau[10_000:].view(100, 200)} for tau in taus_K]
    base = {name: torch.zeros_like(tensor) for name, tensor in experts[0].items()}
    found = state_dict(merge("pcb", base, experts, density=ratio, scale=1))
    found = torch.cat([found["a"], found["b"].reshape(-1)])
    torch.testing.assert_close(found / size, authors(taus_K, ratio) / size, rtol=0, atol=2e-5)


def update(taus, **parameters):
    base = {"w": torch.zeros_like(taus[0])}
    return state_dict(merge("pcb", base, [{"w": tau} for tau in taus], scale=1, **parameters))["w"]


def test_values_that_are_all_equal_are_kept():
    """The fault of the authors' code: 0 / 0."""
    same = torch.full((50,), 0.25)
    assert torch.isnan(authors(torch.stack([same, same]).double(), 0.1)).all()
    torch.testing.assert_close(update([same, same]), same)
    assert not update([same, -same]).any()
    assert not update([0 * same, 0 * same]).any()
    for shape in ((), (1,), (0, 3)):
        torch.testing.assert_close(update([torch.ones(shape), torch.ones(shape)]), torch.ones(shape))


def test_who_speaks_against_the_sum_is_never_heard():
    taus_K = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    merged = update(list(taus_K), density=1.0)
    assert not ((merged * taus_K.sum(0)) < 0).any()


def test_scale_is_linear_and_many_experts_do_not_overflow(assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 3)
    one = state_dict(merge("pcb", base, experts, scale=1.0))
    three = state_dict(merge("pcb", base, experts, scale=3.0))
    assert_close(three, {n: base[n].double() + 3 * (one[n].double() - base[n].double()) for n in base}, 1e-6)
    many = update([t for t in torch.randn(20, 500, generator=torch.Generator().manual_seed(1))], density=0.2)
    assert torch.isfinite(many).all()
    assert many.any()
