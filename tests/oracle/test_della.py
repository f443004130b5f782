"""DARE-TIES and DELLA against their equations with the same coins, and against their expectation with many."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.errors import LayoutError, ParameterError
from eutectic.merge.api import merge, state_dict
from eutectic.methods._transforms import random_uint32

NAMES = "vwxyz"


def coins(name, k, n, seed):
    return (random_uint32((seed, name, NAMES[k]), 0, n) / 2.0**32).tolist()


def models(k, grid=False):
    base = naive.random_model(0, grid)
    return base, dict(zip(NAMES, naive.fine_tunes(base, k, grid=grid), strict=False))


def rows_of(tensor):
    """A vector is one row; of a tensor with more axes the first counts the rows."""
    return tensor.reshape(1 if tensor.ndim < 2 else len(tensor), -1).tolist()


def probabilities(tensor, p, epsilon):
    """MAGPRUNE, row by row: from p − ε for the smallest magnitude to p + ε for the largest."""
    found = []
    for row in rows_of(tensor):
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
        place = [0.0] * len(row)
        for rank, i in enumerate(order):
            place[i] = p - epsilon + 2 * epsilon * rank / (len(row) - 1) if len(row) > 1 and p < 1 else p
        found += place
    return found


def dropped(tau, k, p, epsilon, seed):
    out = {}
    for name, tensor in tau.items():
        values, keep = tensor.reshape(-1).tolist(), probabilities(tensor, p, epsilon)
        toss = coins(name, k, len(values), seed)
        pruned = [v / q if c < q else 0.0 for v, q, c in zip(values, keep, toss, strict=True)]
        out[name] = torch.tensor(pruned, dtype=torch.float64).view(tensor.shape)
    return out


def elected(base, taus, weights, scale):
    merged = {}
    for name, tensor in naive.wide(base).items():
        update = []
        for values in zip(*(tau[name].reshape(-1).tolist() for tau in taus), strict=True):
            mass = math.fsum(values)
            agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if v * mass > 0]
            total = sum(abs(w) for w, _ in agreeing)
            update.append(sum(w * v for w, v in agreeing) / total if total else 0.0)
        merged[name] = tensor + scale * torch.tensor(update, dtype=torch.float64).view(tensor.shape)
    return merged


def each(value, k):
    return value if isinstance(value, list) else [value] * k


CASES = [(2, 0.3, None), (3, [0.2, 0.5, 1.0], [1.0, 2.0, 0.5]), (4, 0.7, [1, -1, 0, 3]), (5, 0.5, None), (3, 1.0, None)]


# on the grid with powers of two: divided by others, votes that cancel leave a rounding, whose sign no oracle knows
@pytest.mark.parametrize(
    ("k", "density", "weights", "grid"),
    [(*case, False) for case in CASES]
    + [(2, 0.25, None, True), (3, [0.25, 0.5, 1.0], [1.0, 2.0, 0.5], True), (5, 0.5, [1, -1, 0, 3, 2], True)],
)
def test_dare_ties(k, density, weights, grid, assert_close):
    base, experts = models(k, grid)
    taus = [
        dropped(tau, i, p, 0.0, 11)
        for i, (tau, p) in enumerate(zip(naive.task_vectors(base, list(experts.values())), each(density, k), strict=True))
    ]
    wanted = elected(base, taus, weights or [1] * k, 0.7)
    assert_close(
        state_dict(merge("dare_ties", base, experts, density=density, weights=weights, scale=0.7, seed=11)), wanted, 3e-6
    )


@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize(("k", "density", "weights"), CASES)
def test_della(k, density, weights, grid, assert_close):
    base, experts = models(k, grid)
    taus = [
        dropped(tau, i, p, 0.15, 5)
        for i, (tau, p) in enumerate(zip(naive.task_vectors(base, list(experts.values())), each(density, k), strict=True))
    ]
    options = {"density": density, "epsilon": 0.15, "weights": weights, "seed": 5}
    wanted = elected(base, taus, weights or [1] * k, 0.7)
    assert_close(state_dict(merge("della", base, experts, scale=0.7, **options)), wanted, 5e-6)
    added = {
        name: base[name].double() + 0.3 * sum(w * tau[name] for w, tau in zip(weights or [1] * k, taus, strict=True))
        for name in base
    }
    assert_close(state_dict(merge("della_linear", base, experts, scale=0.3, **options)), added, 5e-6)


def test_without_epsilon_it_is_dare():
    base, experts = models(3)
    for plain, ranked, options in (("dare", "della_linear", {"scale": 0.3}), ("dare_ties", "della", {})):
        a = state_dict(merge(plain, base, experts, density=0.3, seed=2, **options))
        b = state_dict(merge(ranked, base, experts, density=0.3, epsilon=0, seed=2, **options))
        assert all(torch.equal(a[name], b[name]) for name in base), ranked


def test_the_mean_is_the_task_vector_which_mergekits_is_not():
    # mergekit multiplies what is left of a tensor by one number, Σ |τ| / Σ |kept|: its largest entries come out too large
    n, draws, p, epsilon = 40, 1500, 0.4, 0.3
    tau = torch.linspace(0.2, 2, n)
    found = state_dict(
        merge("della_linear", {"w": torch.zeros(draws, n)}, [{"w": tau.repeat(draws, 1)}], density=p, epsilon=epsilon, scale=1)
    )["w"].double()
    tau = tau.double()
    keep = torch.tensor(probabilities(tau, p, epsilon), dtype=torch.float64)
    spread = tau * ((1 - keep) / keep / draws).sqrt()
    assert ((found.mean(0) - tau) / spread).abs().max() < 4.5
    kept = torch.where(found != 0, tau, 0)
    theirs = (kept * (tau.sum() / kept.sum(1, keepdim=True))).mean(0)
    assert ((theirs - tau) / spread).abs().max() > 10
    assert theirs[-1] > 1.2 * tau[-1]
    assert theirs[0] < 0.5 * tau[0]


def test_the_share_that_is_kept_grows_with_the_rank():
    tau = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    out = state_dict(merge("della_linear", {"w": torch.zeros(400, 100)}, [{"w": tau}], density=0.4, epsilon=0.3, scale=1))["w"]
    ordered = (out != 0).gather(1, tau.abs().argsort(1)).double().mean(0)
    wanted = torch.linspace(0.1, 0.7, 100, dtype=torch.float64)
    assert (ordered - wanted).abs().max() < 4.5 * 0.5 / 20
    assert abs(float(ordered.mean()) - 0.4) < 0.01


def test_rows_of_one_entry_are_kept_with_p():
    # 0 / 0 in mergekit and the authors' code
    base = {"one": torch.zeros(1), "column": torch.zeros(500, 1), "scalar": torch.zeros(())}
    out = state_dict(merge("della_linear", base, [{name: t + 1 for name, t in base.items()}], density=0.25, scale=1))
    assert set(out["column"].unique().tolist()) == {0.0, 4.0}
    assert abs(float((out["column"] != 0).double().mean()) - 0.25) < 0.09
    assert out["one"].item() in (0.0, 4.0)
    assert out["scalar"].item() in (0.0, 4.0)


@pytest.mark.parametrize("method", ["dare_ties", "della", "della_linear"])
def test_what_is_refused(method):
    base, experts = models(3)
    for density in (0, [0.5, 0, 0.5]):
        with pytest.raises(ParameterError, match="density"):
            merge(method, base, experts, density=density)
    with pytest.raises(LayoutError, match="exactly 2"):
        merge(method, base, experts, density=[0.5, 0.5])
    with pytest.raises(ParameterError, match="agree in their length"):
        merge(method, base, experts, density=[0.5, 0.5, 0.5], weights=[1, 1])
    if method != "dare_ties":
        for p, epsilon in ((0.9, 0.15), (0.1, 0.1), (0.1, 0.2)):
            with pytest.raises(ParameterError, match="give an epsilon below 0.1"):
                merge(method, base, experts, density=p, epsilon=epsilon)
        merge(method, base, experts, density=1, epsilon=0.5)
