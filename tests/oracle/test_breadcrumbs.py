"""Breadcrumbs against sorts and loops, and against the faults of mergekit's."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.errors import LayoutError, ParameterError
from eutectic.merge.api import merge, state_dict

CASES = [
    (0.1, 0.01),
    (0.5, 0.2),
    (0.9, 0.1),
    (1.0, 0.0),
    (0.0, 0.0),
    (0.0, 1.0),
    (0.3, 0.7),
    (1e-9, 0.5),
    ([0.1, 0.5, 0.9], 0.1),
]


def masked(tau, density, gamma):
    """What ranks among γN < rank ≤ γN + pN in its tensor, and what ties with the ends."""
    out = {}
    for name, tensor in tau.items():
        n = tensor.numel()
        keep = max(1, round(density * n))
        cut = max(0, min(round(gamma * n), n - keep))
        ordered = sorted(tensor.abs().reshape(-1).tolist(), reverse=True)
        highest, lowest = ordered[cut], ordered[cut + keep - 1]
        band = (tensor.abs() <= highest) & (tensor.abs() >= lowest)
        out[name] = torch.where(band, tensor, 0.0) if density else torch.zeros_like(tensor)
    return out


def crumbs(base, experts, density, gamma):
    densities = density if isinstance(density, list) else [density] * len(experts)
    return [masked(tau, p, gamma) for tau, p in zip(naive.task_vectors(base, experts), densities, strict=True)]


@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize(("density", "gamma"), CASES)
def test_breadcrumbs(density, gamma, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, 3, grid=grid)
    taus = crumbs(base, experts, density, gamma)
    for weights in (None, [1, -2, 0.5]):
        found = state_dict(merge("breadcrumbs", base, experts, density=density, gamma=gamma, scale=0.3, weights=weights))
        wanted = {
            name: base[name].double() + 0.3 * sum(w * tau[name] for w, tau in zip(weights or [1] * 3, taus, strict=True))
            for name in base
        }
        assert_close(found, wanted, 2e-6)


@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize(("density", "gamma"), CASES)
def test_breadcrumbs_ties(density, gamma, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, 3, grid=grid)
    taus = crumbs(base, experts, density, gamma)
    wanted = {}
    for name, tensor in naive.wide(base).items():
        update = []
        for values in zip(*(tau[name].reshape(-1).tolist() for tau in taus), strict=True):
            agreeing = [v for v in values if v * math.fsum(values) > 0]
            update.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
        wanted[name] = tensor + 0.8 * torch.tensor(update, dtype=torch.float64).view(tensor.shape)
    assert_close(state_dict(merge("breadcrumbs_ties", base, experts, density=density, gamma=gamma, scale=0.8)), wanted, 2e-6)


def test_worked_example():
    tau = torch.tensor([0.1, -9.0, 3.0, -2.0, 0.5, 8.0, 1.0, -0.2, 4.0, 0.0])
    out = state_dict(merge("breadcrumbs", {"w": torch.zeros(10)}, [{"w": tau}], density=0.3, gamma=0.2, scale=1))
    assert out["w"].tolist() == [0, 0, 3, -2, 0, 0, 0, 0, 4, 0]


@pytest.mark.parametrize(("n", "gamma"), [(64, 0.0), (64, 0.005), (1000, 0.0), (20, 0.02)])
def test_gamma_below_one_entry_drops_no_outlier_where_mergekits_keeps_nothing(n, gamma):
    # mergekit starts the kept band at -n_top of the order; with n_top = 0 that is its start, and the band is empty
    tau = torch.randn(n, generator=torch.Generator().manual_seed(n))
    n_top, keep = int(gamma * n), int(0.5 * n)
    order = tau.abs().argsort()
    assert len(order[n - keep - n_top : -n_top]) == 0
    out = state_dict(merge("breadcrumbs", {"w": torch.zeros(n)}, [{"w": tau}], density=0.5, gamma=gamma, scale=1))["w"]
    assert int((out != 0).sum()) == keep
    assert torch.equal(out, torch.where(tau.abs() >= tau.abs().sort().values[-keep], tau, 0))


def test_mergekits_band_where_it_is_right(assert_close):
    tau = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    order = tau.abs().argsort()
    kept = torch.zeros(1000)
    kept[order[1000 - 300 - 20 : -20]] = 1
    out = state_dict(merge("breadcrumbs", {"w": torch.zeros(1000)}, [{"w": tau}], density=0.3, gamma=0.02, scale=1))
    assert torch.equal(out["w"], tau * kept)


def test_equal_magnitudes_are_all_kept():
    tau = torch.tensor([0.5, -0.5]).repeat(50)
    out = state_dict(merge("breadcrumbs", {"w": torch.zeros(100)}, [{"w": tau}], density=0.1, gamma=0.1, scale=1))
    assert torch.equal(out["w"], tau)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_what_is_refused(method):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 2)
    for density in (0.95, [0.5, 0.95]):
        with pytest.raises(ParameterError, match="density = 0.95 and gamma = 0.1"):
            merge(method, base, experts, density=density, gamma=0.1)
    with pytest.raises(LayoutError, match="exactly 3"):
        merge(method, base, experts, density=[0.5, 0.5, 0.5])
