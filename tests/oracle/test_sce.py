"""SCE against its three steps, written with loops and a sort."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import naive

from eutectic.merge.api import merge, state_dict


def sce(taus, density, down=False):
    """The update of one tensor."""
    flat = [tau.double().reshape(-1).tolist() for tau in taus]
    columns = list(zip(*flat, strict=True))
    k = len(flat)
    if density < 1:  # select
        variance = []
        for column in columns:
            mean = sum(column) / k
            variance.append(float(torch.tensor(sum((v - mean) ** 2 for v in column), dtype=torch.float32)))
        varying = sorted((v for v in variance if v > 0), reverse=True)
        count = int(density * len(varying)) if down else max(1, round(density * len(varying)))
        threshold = varying[count - 1] if varying and density > 0 and count else float("inf")
        columns = [c if v >= threshold else (0.0,) * k for c, v in zip(columns, variance, strict=True)]
    energy = [sum(column[i] ** 2 for column in columns) for i in range(k)]  # calculate
    share = [e / sum(energy) for e in energy] if sum(energy) else [0.0] * k
    merged = []
    for column in columns:  # erase
        mass = sum(column)
        kept = [(q, v) for q, v in zip(share, column, strict=True) if v * mass > 0]
        merged.append(sum(q * v for q, v in kept) / sum(q for q, _ in kept) if kept else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view(taus[0].shape)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("density", [0, 0.01, 0.3, 0.9, 1])
@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize("count", ["nearest", "down"])
def test_sce(k, density, grid, count, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, k, grid=grid)
    taus = naive.task_vectors(base, experts)
    wanted = {name: base[name].double() + sce([tau[name] for tau in taus], density, count == "down") for name in base}
    assert_close(state_dict(merge("sce", base, experts, density=density, count=count)), wanted)


def merged(taus, density=1.0):
    base = {"w": torch.zeros_like(taus[0])}
    return state_dict(merge("sce", base, [{"w": tau} for tau in taus], density=density))["w"]


def test_worked_example():
    # energies 25 : 5; entry 0 agrees, in entry 1 the second is the minority
    taus = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, -2.0])]
    torch.testing.assert_close(merged(taus), torch.tensor([(25 * 3 + 5 * 1) / 30, 4.0]))


def test_selection_keeps_what_varies_most():
    taus = torch.tensor([[1.0, 5.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert merged(list(taus), 0.5).tolist() == pytest.approx([0, (25 * 5 + 1) / 26, 0, 0])
    assert merged(list(taus), 1.0)[0] == 1.0
    assert not merged([taus[0], taus[0]], 0.9).any(), "what does not vary is not selected"


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_mergekits_formula(density):
    """The authors' code, contributed to mergekit; it keeps exactly the top k, and k is rounded down."""
    deltas = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = deltas.var(0, unbiased=False)
    mask = torch.zeros(1000, dtype=torch.float64)
    mask[variance.topk(int(density * 1000)).indices] = 1
    selected = deltas * mask
    weights = (selected**2).mean(1)
    weights = weights / weights.sum()
    agree = selected.sign() == (selected.sum(0) >= 0) * 2.0 - 1
    erased = weights[:, None] * agree
    divisor = erased.sum(0)
    theirs = (selected * erased).sum(0) / torch.where(divisor == 0, 1, divisor)
    torch.testing.assert_close(merged(list(deltas), density), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-4, 1e-12, 1e-30, 1e8])
def test_weights_do_not_become_uniform_for_small_task_vectors(size):
    """The fault: mergekit takes equal weights once the mean squares sum to less than 10⁻⁶, as after most fine-tuning."""
    x = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    found = merged([0.2 * size * x, size * x])  # energies 0.04 : 1
    torch.testing.assert_close(found / size, x * (0.04 * 0.2 + 1) / 1.04, rtol=1e-9, atol=0)
    assert abs(float((found / size / x).mean()) - 0.6) > 0.3, "0.6 is the uniform mean"


def test_an_expert_of_no_energy_to_speak_of_still_counts_alone():
    taus = [torch.tensor([0.0, 1e-15]), torch.tensor([1e15, 0.0])]
    assert merged(taus).tolist() == pytest.approx([1e15, 1e-15])


def test_entries_that_cancel_stay_or_take_the_positive_ones():
    taus = [torch.tensor([2.0, -1.0, 0.0]), torch.tensor([-2.0, 1.0, 0.0])]
    base = {"w": torch.full((3,), 5.0)}
    experts = [{"w": base["w"] + tau} for tau in taus]
    assert state_dict(merge("sce", base, experts))["w"].tolist() == [5, 5, 5]
    assert state_dict(merge("sce", base, experts, balanced="positive"))["w"].tolist() == [7, 6, 5]
