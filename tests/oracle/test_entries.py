"""MagMax, NearSwap and Passthrough against loops over the entries."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import naive

from eutectic.errors import LayoutError, ParameterError
from eutectic.merge.api import merge, state_dict


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_magmax(k, grid, scale, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, k, grid=grid)
    taus = naive.task_vectors(base, experts)
    wanted = {}
    for name, tensor in base.items():
        update = []
        for column in zip(*[tau[name].reshape(-1).tolist() for tau in taus], strict=True):
            largest = max(map(abs, column))
            winners = {v for v in column if abs(v) == largest}
            update.append(winners.pop() if len(winners) == 1 else 0.0)
        wanted[name] = tensor.double() + scale * torch.tensor(update, dtype=torch.float64).view(tensor.shape)
    assert_close(state_dict(merge("magmax", base, experts, scale=scale)), wanted)


def test_magmax_is_the_authors_where_nothing_ties():
    taus_K = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    theirs = taus_K[0]
    for tau in taus_K[1:]:
        theirs = torch.where(tau.abs() >= theirs.abs(), tau, theirs)
    found = state_dict(merge("magmax", {"w": torch.zeros(500)}, [{"w": tau} for tau in taus_K], scale=1))["w"]
    assert torch.equal(found, theirs)


def test_magmax_of_opposite_equals_does_not_depend_on_the_order():
    base = {"w": torch.zeros(4)}
    a, b = {"w": torch.tensor([1.0, 2.0, -3.0, 0.0])}, {"w": torch.tensor([-1.0, 1.0, -3.0, 0.0])}
    for experts in ([a, b], [b, a]):
        assert state_dict(merge("magmax", base, experts, scale=1))["w"].tolist() == [0, 2, -3, 0]


@pytest.mark.parametrize("t", [1e-4, 0.1, 0.5, 100.0])
@pytest.mark.parametrize("grid", [False, True])
def test_nearswap_is_mergekits(t, grid, assert_close):
    base = naive.random_model(0, grid)
    (expert,) = naive.fine_tunes(base, 1, grid=grid)
    wanted = {}
    for name in base:
        v0, v1 = base[name].double(), expert[name].double()
        weight = torch.nan_to_num(t / (v0 - v1).abs(), nan=1.0, posinf=1.0, neginf=1.0).clamp(0, 1)
        wanted[name] = weight * v1 + (1 - weight) * v0
    assert_close(state_dict(merge("nearswap", base, [expert], t=t)), wanted)


def test_nearswap_takes_one_and_a_positive_t():
    base = naive.random_model(0)
    with pytest.raises(LayoutError, match="exactly 1"):
        merge("nearswap", base, [base, base])
    for t in (0, -1):
        with pytest.raises(ParameterError, match="'t'"):
            merge("nearswap", base, [base], t=t)


@pytest.mark.parametrize("scale", [1, 0, -0.5, 2])
def test_passthrough(scale, assert_close):
    expert = naive.random_model(0)
    found = state_dict(merge("passthrough", None, [expert], scale=scale))
    assert_close(found, {name: scale * tensor.double() for name, tensor in expert.items()})
    if scale == 1:
        assert all(torch.equal(found[name], expert[name]) for name in expert)
    with pytest.raises(LayoutError, match="exactly 1"):
        merge("passthrough", None, [expert, expert])
