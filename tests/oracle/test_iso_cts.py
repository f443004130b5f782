"""Iso-CTS against full decompositions, and what must be flat in it."""

from __future__ import annotations

import pytest
import torch
from tests.oracle.matrices import close, lora, model, task_vectors

from eutectic.merge.api import merge, state_dict


def iso_cts(taus, common):
    """Algorithm 2 with whole SVDs; for matrices of full rank."""
    sides, k = min(taus[0].shape), len(taus)
    own = round((sides - int(sides * common)) / k)
    U, s, Vh = torch.linalg.svd(sum(taus), full_matrices=False)
    left = sides - own * k
    us, ss, vs = [U[:, :left]], [s[:left]], [Vh[:left]]
    for tau in taus:
        u, s, vh = torch.linalg.svd(tau - U[:, :left] @ U[:, :left].T @ tau, full_matrices=False)
        us.append(u[:, :own])
        ss.append(s[:own])
        vs.append(vh[:own])
    a, _, b = torch.linalg.svd(torch.cat(us, 1), full_matrices=False)
    c, _, d = torch.linalg.svd(torch.cat(vs), full_matrices=False)
    return torch.cat(ss).mean() * (a @ b) @ (c @ d)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("common", [0.3, 0.8, 1])
def test_iso_cts(k, common):
    base, experts = model(k)
    found = state_dict(merge("iso_cts", base, experts, common=common, scale=1.3))
    for name in ("wide", "tall", "square"):
        close(found[name], base[name] + 1.3 * iso_cts(task_vectors(base, experts, name), common), 1e-6)
    for name in ("vector", "embed.weight", "conv", "column"):
        close(found[name], base[name] + 1.3 * sum(task_vectors(base, experts, name)) / k, 1e-12)


def test_all_common_is_iso_c():
    base, experts = model(3)
    cts, c = (state_dict(merge(method, base, experts, **more)) for method, more in (("iso_cts", {"common": 1}), ("iso_c", {})))
    for name in base:
        close(cts[name], c[name], 1e-7)


@pytest.mark.parametrize("common", [0, 0.5, 0.8])
def test_all_singular_values_are_equal(common):
    base, experts = model(3)
    found = state_dict(merge("iso_cts", base, experts, common=common))
    for name in ("wide", "tall", "square"):
        s = torch.linalg.svdvals(found[name] - base[name])
        assert s[s > 1e-6 * s[0]].std() < 1e-6 * s[0]
        assert int((s > 1e-6 * s[0]).sum()) == len(s)


def test_more_tasks_than_directions():
    base, experts = model(15)
    for common in (0, 0.8):
        found = state_dict(merge("iso_cts", base, experts, common=common))
        assert all(bool(t.isfinite().all()) for t in found.values())


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("common", [0.1, 0.8])
def test_low_rank(k, common):
    # the sum holds all that the tasks have: what is left of them is rounding and must not be flattened to full strength
    base, experts, columns, rows = lora(k)
    found = state_dict(merge("iso_cts", base, experts, common=common))["w"].double()
    for frame, side in ((columns, found), (rows, found.T)):
        assert (side - frame @ (frame.T @ side)).abs().max() < 1e-5 * found.abs().max()
    s = torch.linalg.svdvals(found)
    assert s[: 2 * k].std() < 1e-5 * s[0]
    assert s[2 * k] < 1e-5 * s[0]
    close(found, state_dict(merge("iso_c", base, experts))["w"].double(), 1e-5) if common == 0.8 else None


def test_no_change_is_no_change():
    _, experts, *_ = lora(1)
    assert torch.equal(state_dict(merge("iso_cts", experts[0], [experts[0]] * 3))["w"], experts[0]["w"])
