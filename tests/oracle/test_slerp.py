"""SLERP against Kahan's angle in float64, most of all where the arc is ill-defined."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.merge.api import merge, state_dict


def slerp(a, b, t):
    return state_dict(merge("slerp", None, [{"w": a}, {"w": b}], t=t))["w"]


@pytest.mark.parametrize("t", [0, 0.1, 0.5, 0.77, 1, 1.3, -0.5])
def test_slerp(t, assert_close):
    first = naive.random_model(0)
    second = naive.random_model(1, scale=3.0)
    assert_close(state_dict(merge("slerp", None, [first, second], t=t)), naive.slerp(first, second, t), 3e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_fine_tunes_of_one_base(t, assert_close):
    first, second = naive.fine_tunes(naive.random_model(0, scale=50.0), 2)
    assert_close(state_dict(merge("slerp", None, [first, second], t=t)), naive.slerp(first, second, t))


def test_worked_example():
    # a quarter turn: half of it lies on the diagonal; a third of it at 30°
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(x, y, 0.5), torch.tensor([math.sqrt(0.5), math.sqrt(0.5)]))
    torch.testing.assert_close(slerp(x, y, 1 / 3), torch.tensor([math.sqrt(0.75), 0.5]))
    torch.testing.assert_close(slerp(2 * x, 3 * y, 0.5), torch.tensor([2 * math.sqrt(0.5), 3 * math.sqrt(0.5)]))


@pytest.mark.parametrize("t", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("angle", [1e-9, 1e-7, 0.9e-6, 1.1e-6, 1e-5, 1e-4, 0.03, 1.0, 3.1])
@pytest.mark.parametrize("flip", [1, -1], ids=["near parallel", "near antiparallel"])
def test_angles_of_all_sizes(t, angle, flip):
    if flip < 0 and 1e-6 < angle < 1e-4:
        pytest.skip("the arc is ill-conditioned: the last digits of the angle decide")
    random = torch.Generator().manual_seed(3)
    u, v = torch.linalg.qr(torch.randn(500, 2, generator=random, dtype=torch.float64)).Q.T
    a, b = 2 * u, flip * (math.cos(angle) * u + math.sin(angle) * v)
    found, wanted = slerp(a, b, t), naive.slerp_tensor(a, b, t)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7 if flip > 0 else 1e-4)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_parallel_antiparallel_and_zero_take_the_line(t):
    a = torch.randn(300, generator=torch.Generator().manual_seed(0))
    for b in (a, 3 * a, -a, -0.5 * a, torch.zeros(300)):
        for first, second in ((a, b), (b, a)):
            line = (1 - t) * first.double() + t * second.double()
            torch.testing.assert_close(slerp(first, second, t).double(), line, rtol=0, atol=1e-6)
    assert torch.equal(slerp(torch.zeros(4), torch.zeros(4), t), torch.zeros(4))


def test_ends_are_the_experts():
    first, second = naive.random_model(0), naive.random_model(1)
    for t, end in ((0, first), (1, second)):
        found = state_dict(merge("slerp", None, [first, second], t=t))
        for name in end:
            torch.testing.assert_close(found[name], end[name], rtol=2e-7, atol=1e-7)


def test_the_arc_keeps_the_norm_of_unit_vectors():
    random = torch.Generator().manual_seed(1)
    a, b = torch.nn.functional.normalize(torch.randn(2, 1000, generator=random), dim=1)
    for t in (0.1, 0.5, 0.9):
        assert abs(float(slerp(a, b, t).norm()) - 1) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_does_not_matter(size, dtype):
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 100, generator=random, dtype=torch.float64).to(dtype)
    wanted = naive.slerp_tensor(a, b, 0.3) * size
    torch.testing.assert_close(slerp(a * size, b * size, 0.3).double() / size, wanted / size, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-120, 1e120])
def test_size_does_not_matter_in_float64(size):
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 100, generator=random, dtype=torch.float64)
    wanted = naive.slerp_tensor(a, b, 0.3)
    torch.testing.assert_close(slerp(a * size, b * size, 0.3) / size, wanted, rtol=1e-9, atol=1e-9)
