"""WUDI and ASWUDI against the loss, its gradient flow and its minimum."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle.matrices import close, lora, model, task_vectors

from eutectic.merge.api import merge, state_dict


def parts(taus):
    """C and D of the loss's gradient 2 (M C − D), and the sum of the task vectors, where the flow starts."""
    C = sum(t.T @ t / t.norm() ** 2 for t in taus)
    D = sum(t @ t.T @ t / t.norm() ** 2 for t in taus)
    return C, D, sum(taus)


def loss(M, taus):
    return float(sum(((M - t) @ t.T).norm() ** 2 / t.norm() ** 2 for t in taus if t.norm() > 0))


def flow(taus, time):
    """dM/dt = D − M C, solved by the matrix exponential."""
    C, D, start = parts(taus)
    end = D @ torch.linalg.pinv(C)
    return end + (start - end) @ torch.linalg.matrix_exp(-C * time)


def truncated(taus):
    C, D, start = parts(taus)
    values, vectors = torch.linalg.eigh(C)
    values = values.clamp(min=0)
    rank = math.ceil(float(values.sqrt().sum() ** 2 / values.sum()) - 1e-9)
    for value, v in list(zip(values, vectors.T, strict=True))[::-1][:rank]:
        start = start - (start @ v)[:, None] * v + (D @ v)[:, None] * v / value
    return start


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("time", [0, 3, 300])
def test_wudi(k, time):
    base, experts = model(k)
    found = state_dict(merge("wudi", base, experts, time=time, scale=0.8))
    for name in ("wide", "tall", "square"):
        close(found[name], base[name] + 0.8 * flow(task_vectors(base, experts, name), time), 1e-9)
    for name in ("vector", "embed.weight", "conv", "column"):
        close(found[name], base[name] + 0.8 * sum(task_vectors(base, experts, name)) / k, 1e-12)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_aswudi(k):
    base, experts = model(k)
    found = state_dict(merge("aswudi", base, experts, scale=0.8))
    for name in ("wide", "tall", "square"):
        close(found[name], base[name] + 0.8 * truncated(task_vectors(base, experts, name)), 1e-9)
    for name in ("vector", "embed.weight", "conv", "column"):
        close(found[name], base[name] + 0.8 * sum(task_vectors(base, experts, name)) / k, 1e-12)


def test_the_flow_is_small_steps_down_the_gradient():
    base, experts = model(3)
    taus = task_vectors(base, experts, "square")
    C, D, M = parts(taus)
    for _ in range(4000):
        M = M - 0.0025 * (M @ C - D)
    found = state_dict(merge("wudi", base, experts, time=10))["square"] - base["square"]
    close(found, M, 1e-3)


def test_the_loss_falls_with_time_to_its_minimum():
    base, experts = model(4)
    taus = task_vectors(base, experts, "tall")
    merges = [state_dict(merge("wudi", base, experts, time=t))["tall"] - base["tall"] for t in (0, 1, 10, 100, 1e4, 1e12)]
    losses = [loss(M, taus) for M in merges]
    assert losses == sorted(losses, reverse=True)
    close(merges[0], sum(taus), 1e-12)
    C, D, _ = parts(taus)
    close(merges[-1] @ C, D, 1e-8)
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert loss(merges[-1] + 0.01 * torch.randn(taus[0].shape, generator=random, dtype=torch.float64), taus) > losses[-1]


@pytest.mark.parametrize("method", ["wudi", "aswudi"])
def test_tasks_in_spaces_of_their_own_are_added(method):
    # disjoint rows and columns: nobody disturbs anybody, and the sum is the minimum
    random = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(30, 24, generator=random, dtype=torch.float64)).Q
    taus = [frame[:, c : c + 8] @ torch.rand(8, generator=random).double().diag() @ other[:, c : c + 8].T for c in (0, 8, 16)]
    found = state_dict(merge(method, {"w": torch.zeros(24, 30).double()}, [{"w": t} for t in taus]))["w"]
    close(found, sum(taus), 1e-9)


@pytest.mark.parametrize("method", ["wudi", "aswudi"])
def test_low_rank_and_unchanged_experts(method):
    base, experts, columns, rows = lora(3)
    found = state_dict(merge(method, base, experts))["w"].double() - base["w"].double()
    taus = [(expert["w"] - base["w"]).double() for expert in experts]
    close(found, flow(taus, 300) if method == "wudi" else truncated(taus), 2e-5)
    for frame, side in ((columns, found), (rows, found.T)):
        assert (side - frame @ (frame.T @ side)).abs().max() < 1e-5 * found.abs().max(), "noise outside of the experts' spans"
    still = state_dict(merge(method, base, [*experts, base]))["w"].double() - base["w"].double()
    close(still, found, 1e-5)
    assert torch.equal(state_dict(merge(method, base, [base, base]))["w"], base["w"])
