"""DARE against its equations with the same coins, and against its expectation with many."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.errors import ParameterError
from eutectic.merge.api import merge, state_dict
from eutectic.methods._method import Site
from eutectic.methods._transforms import random_uint32
from eutectic.methods.dare import dare


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
def test_dare_with_the_same_coins(density, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = dict(zip("xyz", naive.fine_tunes(base, 3, grid=grid), strict=True))

    def coin(name, k, n):
        return random_uint32((11, name, "xyz"[k]), 0, n) / 2.0**32

    wanted = naive.dare(base, list(experts.values()), density, 0.3, coin)
    assert_close(state_dict(merge("dare", base, experts, density=density, scale=0.3, seed=11)), wanted, 2e-6)


def test_the_mean_over_seeds_is_task_arithmetic():
    tau_K = torch.stack([torch.linspace(-1, 1, 60), torch.linspace(2, 0, 60)])
    site = Site("w", (60,), 0, ("a", "b"))
    seeds, density, scale = 400, 0.25, 0.5
    merges = torch.stack([dare(density, scale, seed).apply(tau_K, site, {}).double() for seed in range(seeds)])
    spread = scale * ((1 - density) / density * (tau_K.double() ** 2).sum(0)).sqrt() / math.sqrt(seeds)
    z = (merges.mean(0) - scale * tau_K.double().sum(0)) / spread
    assert z.abs().max() < 4.5
    assert 0.6 < float((z**2).mean()) < 1.5


def test_full_density_is_task_arithmetic(assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 4)
    found = state_dict(merge("dare", base, experts, density=1, scale=0.3))
    assert_close(found, naive.task_arithmetic(base, experts, 0.3), 2e-6)


def test_seeds_matter_and_names_matter():
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 2)
    first = state_dict(merge("dare", base, experts, seed=0))
    assert all(torch.equal(first[n], t) for n, t in state_dict(merge("dare", base, experts, seed=0)).items())
    assert not torch.equal(first["f"], state_dict(merge("dare", base, experts, seed=1))["f"])
    renamed = dict(zip("ab", experts, strict=True))
    assert not torch.equal(first["f"], state_dict(merge("dare", base, renamed, seed=0))["f"])


def test_density_zero_is_refused():
    base = naive.random_model(0)
    with pytest.raises(ParameterError, match="density"):
        merge("dare", base, [base], density=0)
