"""Model Stock against its equation, written with angles, and against the geometry that it comes from."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.oracle import naive

from eutectic.errors import LayoutError
from eutectic.merge.api import merge, state_dict


def stock(taus):
    """t · mean for one vector an expert."""
    taus = [tau.double().reshape(-1) for tau in taus]
    cosines = []
    for a, b in itertools.combinations(taus, 2):
        na, nb = float(a.norm()), float(b.norm())
        cosines.append(float(a @ b) / (na * nb) if na and nb else 0.0)
    c = max(0.0, sum(cosines) / len(cosines))
    k = len(taus)
    return k * c / ((k - 1) * c + 1) * sum(taus) / k


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("method", ["model_stock", "model_stock_rows"])
def test_model_stock(method, k, assert_close):
    for grid in (False, True):
        base = naive.random_model(0, grid)
        shared = naive.random_model(50, grid, 0.5)  # so that most angles are acute
        experts = [{n: e[n] + shared[n] for n in e} for e in naive.fine_tunes(base, k, grid=grid)]
        taus = naive.task_vectors(base, experts)
        wanted = {}
        for name, tensor in base.items():
            parts = [tau[name] for tau in taus]
            if method == "model_stock_rows" and tensor.ndim > 1:
                update = torch.stack([stock([part[i] for part in parts]) for i in range(len(tensor))])
            else:
                update = stock(parts)
            wanted[name] = tensor.double() + update.view(tensor.shape)
        assert_close(state_dict(merge(method, base, experts)), wanted, 1e-6)


def update(*taus):
    taus = [torch.tensor(tau, dtype=torch.float64) for tau in taus]
    base = torch.ones_like(taus[0])
    return state_dict(merge("model_stock", {"w": base}, [{"w": base + tau} for tau in taus]))["w"] - base


def test_worked_examples():
    # 60° between two of length 1: t = 2 · ½ / (1 + ½) = ⅔ of their mean
    torch.testing.assert_close(update([1.0, 0.0], [0.5, math.sqrt(0.75)]), 2 / 3 * torch.tensor([0.75, 0.75**0.5 / 2]).double())
    torch.testing.assert_close(update([1.0, 2.0], [3.0, 6.0]), torch.tensor([2.0, 4.0]).double())  # parallel: the mean
    for right_or_obtuse in ([[1.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [-1.0, 0.5]], [[0.0, 0.0], [1.0, 1.0]], [[0.0], [0.0]]):
        assert not update(*right_or_obtuse).any()


def test_it_comes_nearest_to_the_centre():
    """Fine-tunes lie around a centre in directions at right angles to each other and to the base's, as the paper observes."""
    n, random = 200_000, torch.Generator().manual_seed(0)
    centre, base, *noise = torch.randn(5, n, generator=random, dtype=torch.float64)
    base = centre + 2 * base
    experts = [centre + 1.5 * each for each in noise]
    found = state_dict(merge("model_stock", {"w": base}, [{"w": expert} for expert in experts]))["w"]
    mean = sum(experts) / 3
    t = float((found - base) @ (mean - base) / ((mean - base) @ (mean - base)))
    assert abs(t - 3 * (4 / 6.25) / (1 + 2 * 4 / 6.25)) < 0.01
    distances = [float((centre - (base + s * (mean - base))).norm()) for s in (t - 0.05, t, t + 0.05)]
    assert distances[1] == min(distances)


def test_mergekit_walks_away_from_experts_that_disagree():
    """The fault: no bound on t.  Three at 114° from each other, c = −0.4: t = −1.2 / 0.2 = −6."""
    k, c = 3, -0.4
    assert k * c / (1 + (k - 1) * c) == pytest.approx(-6)
    gram = torch.full((3, 3), c, dtype=torch.float64).fill_diagonal_(1)
    taus = torch.linalg.cholesky(gram)
    assert not update(*taus.tolist()).any()


def test_small_task_vectors_have_angles_too():
    """The fault: mergekit divides by norms of at least 10⁻⁶ as a product, so that small ones count as orthogonal."""
    small = 1e-5 * torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(update(small.tolist(), small.tolist()), small, rtol=1e-9, atol=0)


def test_two_are_needed():
    base = naive.random_model(0)
    with pytest.raises(LayoutError, match="at least 2"):
        merge("model_stock", base, [base])
