"""Consensus, EMR and CABS against loops over the entries."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError, ParameterError
from eutectic.merge.api import merge, state_dict
from eutectic.merge.view import Merged

# ── consensus ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def consensus(base, experts, thresholds, agree, scale):
    taus = naive.task_vectors(base, experts)
    merged = {}
    for name, tensor in naive.wide(base).items():
        update = []
        for values in zip(*(tau[name].reshape(-1).tolist() for tau in taus), strict=True):
            mass = math.fsum(values)
            masks = [abs(v) >= t * abs(mass - v) for v, t in zip(values, thresholds, strict=True)]
            update.append(mass if sum(masks) >= agree else 0.0)
        merged[name] = tensor + scale * torch.tensor(update, dtype=torch.float64).view(tensor.shape)
    return merged


@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize("agree", [1, 2])
@pytest.mark.parametrize("threshold", [0, 0.5, [0.25, 0.5, 0.75, 1]])
def test_consensus(threshold, agree, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, 4, grid=grid)
    thresholds = threshold if isinstance(threshold, list) else [threshold] * 4
    found = state_dict(merge("consensus", base, experts, threshold=threshold, agree=agree, scale=0.4))
    assert_close(found, consensus(base, experts, thresholds, agree, 0.4), 2e-6)


def test_consensus_drops_the_selfish_and_the_catastrophic():
    # selfish: one task only; shared: two; cancelled: nobody's (each opposes a larger rest)
    taus = [[5.0, 2.0, 1.0], [0.1, 2.0, 1.0], [0.0, 0.0, -2.0]]
    experts = [{"w": torch.tensor(tau)} for tau in taus]
    base = {"w": torch.zeros(3)}
    found = state_dict(merge("consensus", base, experts, threshold=0.6, scale=1))["w"]
    torch.testing.assert_close(found, torch.tensor([0.0, 4.0, 0.0]))
    one = state_dict(merge("consensus", base, experts, threshold=0.6, agree=1, scale=1))["w"]
    torch.testing.assert_close(one, torch.tensor([5.1, 4.0, 0.0]))


def test_consensus_wants_as_many_experts_as_must_agree(assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 3)
    with pytest.raises(LayoutError, match="at least 4"):
        merge("consensus", base, experts, agree=4)
    with pytest.raises(LayoutError, match="exactly 4"):
        merge("consensus", base, experts, threshold=[0.2, 0.3, 0.4, 0.5])
    with pytest.raises(ParameterError, match="expert"):
        merge("consensus", base, experts, threshold=[0.2], agree=2)
    everything = state_dict(merge("consensus", base, experts, threshold=0, scale=0.3))
    assert_close(everything, naive.task_arithmetic(base, experts, 0.3), 2e-6)


# ── EMR ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def emr(base, experts, chosen):
    taus = naive.task_vectors(base, experts)
    unified = {}
    for name, tensor in base.items():
        update = []
        for values in zip(*(tau[name].reshape(-1).tolist() for tau in taus), strict=True):
            mass = math.fsum(values)
            agreeing = [v for v in values if v * mass > 0]
            update.append(max(agreeing, key=abs) if agreeing else 0.0)
        unified[name] = torch.tensor(update, dtype=torch.float64).view(tensor.shape)
    if chosen is None:
        return {name: base[name].double() + unified[name] for name in base}
    masked = {name: torch.where(taus[chosen][name] * unified[name] > 0, unified[name], 0.0) for name in base}
    whole = math.fsum(v for t in taus[chosen].values() for v in t.abs().reshape(-1).tolist())
    kept = math.fsum(v for t in masked.values() for v in t.abs().reshape(-1).tolist())
    return {name: base[name].double() + whole / kept * masked[name] for name in base}


@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize("k", [2, 5])
def test_emr(k, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = dict(zip("abcde", naive.fine_tunes(base, k, grid=grid), strict=False))
    assert_close(state_dict(merge("emr", base, experts)), emr(base, list(experts.values()), None), 2e-6)
    for i, name in enumerate(experts):
        found = state_dict(merge("emr", base, experts, expert=name))
        assert_close(found, emr(base, list(experts.values()), i), 2e-6)
        tau = naive.task_vectors(base, [experts[name]])[0]
        # the rebuilt task vector never opposes the expert's, and has its total mass
        rebuilt = {n: found[n].double() - base[n].double() for n in base}
        assert all(bool((rebuilt[n] * tau[n] >= -1e-6).all()) for n in base)
        mass = [sum(float(t.abs().sum()) for t in vectors.values()) for vectors in (rebuilt, tau)]
        assert mass[0] == pytest.approx(mass[1], rel=1e-5)


def test_emr_alone_and_with_its_like_is_the_expert(assert_close):
    base = naive.random_model(0)
    (expert,) = naive.fine_tunes(base, 1)
    for count in (1, 3):
        experts = {str(i): expert for i in range(count)}
        assert_close(state_dict(merge("emr", base, experts, expert="0")), naive.wide(expert))


def test_emr_of_an_unknown_or_unchanged_expert():
    base = naive.random_model(0)
    experts = {"a": naive.fine_tunes(base, 1)[0], "still": base}
    with pytest.raises(ParameterError, match="no expert is called 'b'; there are a, still"):
        state_dict(merge("emr", base, experts, expert="b"))
    found = state_dict(merge("emr", base, experts, expert="still"))
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_emrs_number_is_the_same_bits_in_any_chunks():
    random = torch.Generator().manual_seed(0)
    base = {name: torch.zeros(shape) for name, shape in (("a", (30_011,)), ("b", (120, 120)), ("c", (3,)))}
    experts = {str(i): Memory({n: torch.randn(t.shape, generator=random) for n, t in base.items()}) for i in range(3)}

    def read(chunk, names):
        lazy = Merged("emr", Memory(base), experts, {"expert": "1"}, chunk=chunk)
        return {name: lazy.read(name) for name in names}

    wanted = read(1 << 20, "abc")
    for chunk, names in ((4096, "cba"), (8192, "bac")):
        assert all(torch.equal(t, wanted[name]) for name, t in read(chunk, names).items())


# ── CABS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cabs(base, experts, n, m, scale, weights):
    merged = naive.wide(base)
    taken = {name: set() for name in base}
    for weight, tau in zip(weights, naive.task_vectors(base, experts), strict=True):
        for name, tensor in tau.items():
            rows = tensor.reshape(1 if tensor.ndim < 2 else len(tensor), -1)
            kept = torch.zeros_like(rows)
            for i, row in enumerate(rows.tolist()):
                for start in range(0, len(row), m):
                    block = range(start, min(start + m, len(row)))
                    free = [j for j in block if (i, j) not in taken[name] and row[j] != 0]
                    for j in sorted(free, key=lambda j: (-abs(row[j]), j))[: math.ceil(n * len(block) / m)]:
                        kept[i, j] = row[j]
                        taken[name].add((i, j))
            merged[name] = merged[name] + scale * weight * kept.view(tensor.shape)
    return merged


@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 7), (64, 256), (7, 7)])
def test_cabs(n, m, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, 4, grid=grid)
    for weights in (None, [1, -2, 0, 0.5]):
        found = state_dict(merge("cabs", base, experts, n=n, m=m, scale=0.7, weights=weights))
        assert_close(found, cabs(base, experts, n, m, 0.7, weights or [1] * 4), 2e-6)


def test_cabs_never_overlaps_and_order_matters():
    random = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(6, 64)}
    experts = {str(i): {"w": torch.randn(6, 64, generator=random)} for i in range(4)}
    alone = [state_dict(merge("cabs", base, {"a": experts["0"]}, n=4, m=16))["w"]]
    every = state_dict(merge("cabs", base, experts, n=4, m=16))["w"]
    assert torch.equal((alone[0] != 0).view(6, 4, 16).sum(2), torch.full((6, 4), 4))
    assert bool((every != 0).all())  # 4 experts · 4 of 16
    values = torch.stack([expert["w"] for expert in experts.values()])
    assert torch.equal((every == values).sum(0), torch.ones(6, 64, dtype=torch.int64))
    turned = state_dict(merge("cabs", base, dict(reversed(experts.items())), n=4, m=16))["w"]
    assert not torch.equal(every, turned)


def test_cabs_refuses_more_than_a_block():
    base = naive.random_model(0)
    with pytest.raises(ParameterError, match="of 3 entries"):
        merge("cabs", base, [base], n=4, m=3)
