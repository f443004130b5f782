"""Average and task arithmetic against their equations, and against each other."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import naive

from eutectic.errors import LayoutError, ParameterError
from eutectic.merge.api import merge, state_dict


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_average(k, assert_close):
    experts = naive.fine_tunes(naive.random_model(0), k)
    assert_close(state_dict(merge("average", None, experts)), naive.average(experts))


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 0.3, 0.5], [2, 0, 6], [3, -1, 0.5], [-1, -1, -1]])
def test_weighted_average(weights, assert_close):
    experts = naive.fine_tunes(naive.random_model(0), 3)
    assert_close(state_dict(merge("average", None, experts, weights=weights)), naive.average(experts, weights), 3e-6)


def test_weights_must_have_a_mean_and_a_number_for_each_expert():
    experts = naive.fine_tunes(naive.random_model(0), 3)
    with pytest.raises(ParameterError, match="sum to zero"):
        merge("average", None, experts, weights=[1, -2, 1])
    with pytest.raises(LayoutError, match="exactly 2 expert"):
        merge("average", None, experts, weights=[1, 2])
    with pytest.raises(LayoutError, match="exactly 4 expert"):
        merge("task_arithmetic", experts[0], experts, weights=[1, 2, 3, 4])


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("scale", [0, 0.3, 1, -0.5])
def test_task_arithmetic(k, scale, assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, k)
    wanted = naive.task_arithmetic(base, experts, scale)
    assert_close(state_dict(merge("task_arithmetic", base, experts, scale=scale)), wanted, 2e-6)


def test_weighted_task_arithmetic(assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 3)
    found = merge("task_arithmetic", base, experts, scale=0.5, weights=[1, -2, 0])
    assert_close(state_dict(found), naive.task_arithmetic(base, experts, 0.5, [1, -2, 0]))


def test_task_arithmetic_is_linear_in_its_scale(assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 4)
    one, two, three = (state_dict(merge("task_arithmetic", base, experts, scale=scale)) for scale in (0.1, 0.2, 0.3))
    assert_close({name: one[name] + two[name] - base[name] for name in base}, naive.wide(three), 2e-6)


def test_a_scale_of_one_over_k_is_the_average(assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 4)
    assert_close(state_dict(merge("task_arithmetic", base, experts, scale=0.25)), naive.average(experts))


def test_float64_models_are_merged_in_float64(assert_close):
    base = naive.wide(naive.random_model(0))
    experts = [naive.wide(expert) for expert in naive.fine_tunes(naive.random_model(0), 5)]
    assert_close(state_dict(merge("average", None, experts)), naive.average(experts), 1e-15)
    found = state_dict(merge("task_arithmetic", base, experts, scale=0.3))
    assert found["a"].dtype == torch.float64
    assert_close(found, naive.task_arithmetic(base, experts, 0.3), 1e-14)
