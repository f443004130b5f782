"""RAM and RAM+ against loops over the entries, and against mergekit's formula."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import naive

from eutectic.merge.api import merge, state_dict


def ram(base, experts, r, alpha, epsilon):
    """With r = 0, RAM.  ε counts as float32 holds it."""
    epsilon = float(torch.tensor(epsilon))
    taus = naive.task_vectors(base, experts)
    merged = {}
    for name, tensor in naive.wide(base).items():
        columns = list(zip(*(tau[name].reshape(-1).tolist() for tau in taus), strict=True))
        shared, unique = [0] * len(experts), [0] * len(experts)
        changes = [[k for k, value in enumerate(values) if abs(value) > epsilon] for values in columns]
        for changed in changes:
            for k in changed:
                (unique if len(changed) == 1 else shared)[k] += 1
        gain = [1 + r * min(alpha, s / u if u else 0.0) for s, u in zip(shared, unique, strict=True)]
        update = []
        for values, changed in zip(columns, changes, strict=True):
            if len(changed) == 1:
                update.append(gain[changed[0]] * values[changed[0]])
            else:
                update.append(sum(values[k] for k in changed) / max(1, len(changed)))
        merged[name] = tensor + torch.tensor(update, dtype=torch.float64).view(tensor.shape)
    return merged


@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_ram(k, epsilon, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, k, grid=grid)
    assert_close(state_dict(merge("ram", base, experts, epsilon=epsilon)), ram(base, experts, 0, 0, epsilon), 2e-6)
    for r, alpha in ((0.1, 0.2), (2.0, 3.0)):
        found = state_dict(merge("ramplus_tl", base, experts, epsilon=epsilon, r=r, alpha=alpha))
        assert_close(found, ram(base, experts, r, alpha, epsilon), 2e-6)


def test_mergekits_formula():
    base = naive.random_model(1)
    experts = naive.fine_tunes(base, 4)
    found = state_dict(merge("ramplus_tl", base, experts))
    for name, tensor in base.items():
        tau = torch.stack([(expert[name] - tensor).reshape(-1) for expert in experts])
        active = tau.abs() > 1e-5
        count = active.sum(0)
        rho = (active & (count > 1)).sum(1) / (active & (count == 1)).sum(1).clamp(min=1e-5)
        gain = (1 + 0.1 * rho.clamp(0, 0.2))[:, None]
        update = (tau * active * ((count == 1) * gain + (count > 1) / count.clamp(min=1))).sum(0)
        torch.testing.assert_close(found[name], tensor + update.view(tensor.shape), rtol=1e-5, atol=1e-6)


def test_worked_example():
    # 0: only a; 1: both; 2: nobody; 3: only b; b shares one entry of its two: its gain is 1 + 0.5 · min(3, 1)
    experts = [{"w": torch.tensor([2.0, 4.0, 0.0, 0.0, 6.0, 6.0])}, {"w": torch.tensor([0.0, 2.0, 0.0, 8.0, 0.0, 0.0])}]
    base = {"w": torch.zeros(6)}
    assert state_dict(merge("ram", base, experts))["w"].tolist() == [2, 3, 0, 8, 6, 6]
    found = state_dict(merge("ramplus_tl", base, experts, r=0.5, alpha=3))["w"]
    torch.testing.assert_close(found, torch.tensor([2 * 7 / 6, 3, 0, 12, 7, 7]))
    assert state_dict(merge("ramplus_tl", base, experts, r=0))["w"].tolist() == [2, 3, 0, 8, 6, 6]
