"""Arcee Fusion against its definition, with a sort, and against mergekit's formula."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.merge.api import merge, state_dict


def importance(first, second):
    """By rows: the first axis, and all the others together; a vector is one row."""
    a, b = first.double(), second.double()
    a, b = (t.reshape(t.shape[0], -1) if t.ndim > 1 else t.reshape(1, -1) for t in (a, b))
    scores = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        p, q = ([math.exp(v - max(row)) for v in row] for row in (y, x))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        divergence = max(0.0, math.fsum(u * math.log(u / v) for u, v in zip(p, q, strict=True)))
        scores += [abs(v - u) * divergence for u, v in zip(x, y, strict=True)]
    return torch.tensor(scores, dtype=torch.float64).view(first.shape)


def quartile(scores, q):
    return sorted(scores.reshape(-1).tolist())[(scores.numel() - 1) * q // 4]


def threshold(scores):
    return quartile(scores, 2) + 1.5 * (quartile(scores, 3) - quartile(scores, 1))


def fuse(first, second):
    return state_dict(merge("arcee_fusion", None, [{"w": first}, {"w": second}]))["w"]


@pytest.mark.parametrize("seed", range(4))
def test_arcee_fusion(seed):
    base = naive.random_model(seed)
    first, second = naive.fine_tunes(base, 2, seed=10 * seed + 100)
    found = state_dict(merge("arcee_fusion", None, [first, second]))
    for name in base:
        scores = importance(first[name], second[name])
        taken = found[name] == second[name]
        least = threshold(scores)
        clear = (scores - least).abs() > 1e-6 * least  # the last digits of float32 may decide about the threshold itself
        wanted = torch.where(scores >= least, second[name], first[name])
        assert torch.equal(found[name][clear], wanted[clear]), name
        assert torch.equal(found[name], torch.where(taken, second[name], first[name])), "entries are taken whole"
    assert not torch.equal(found["a"], first["a"])
    assert not torch.equal(found["a"], second["a"])


def test_mergekits_formula():
    random = torch.Generator().manual_seed(0)
    base = torch.randn(60, 80, generator=random, dtype=torch.float64)
    params = base + 0.1 * torch.randn(60, 80, generator=random, dtype=torch.float64)
    p, q = params.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    scores = (params - base).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)
    ordered = scores.reshape(-1).sort().values
    low, middle, high = (ordered[int(x * (len(ordered) - 1))] for x in (0.25, 0.5, 0.75))
    mask = scores >= middle + 1.5 * (high - low)
    theirs = base + (params - base) * mask
    torch.testing.assert_close(fuse(base, params), theirs, rtol=0, atol=1e-12)
    assert 0.01 < float(mask.double().mean()) < 0.3


def test_the_outlier_is_taken():
    first = torch.zeros(1, 100)
    second = 0.01 * torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    second[0, 17] = 3.0
    taken = fuse(first, second)
    assert taken[0, 17] == 3.0
    assert int((taken != 0).sum()) < 20


def test_quartiles_of_large_tensors_are_exact():
    """The fault: above 10⁶ entries mergekit's threshold is that of an unseeded sample; a second run gives another model."""
    random = torch.Generator().manual_seed(0)
    first = torch.randn(1050, 1000, generator=random)
    second = first + 0.1 * torch.randn(1050, 1000, generator=random)
    p, q = second.double().log_softmax(1), first.double().log_softmax(1)
    scores = (second.double() - first.double()).abs() * (p.exp() * (p - q)).sum(1, keepdim=True)
    ordered = scores.flatten().sort().values
    last = len(ordered) - 1
    least = ordered[last // 2] + 1.5 * (ordered[3 * last // 4] - ordered[last // 4])
    clear = (scores - least).abs() > 1e-6 * least
    found = fuse(first, second)
    assert torch.equal(found[clear], torch.where(scores >= least, second, first)[clear])
    assert int((~clear).sum()) < 50


def test_small_changes_keep_their_digits():
    random = torch.Generator().manual_seed(1)
    first = torch.randn(50, 40, generator=random, dtype=torch.float64)
    change = torch.randn(50, 40, generator=random, dtype=torch.float64)
    taken = fuse(first, first + 1e-3 * change) != first
    tiny = fuse(first, first + 1e-7 * change) != first
    assert float((taken != tiny).double().mean()) < 0.01, "the choice does not depend on the size of the change"


def test_degenerate_tensors():
    for shape in ((), (1,), (5, 1), (0, 4), (1, 1)):
        first, second = torch.zeros(shape), torch.ones(shape)
        assert torch.equal(fuse(first, first), first)
        assert torch.equal(fuse(first, second), second), "no divergence: the threshold is 0, and all is taken"
    huge = torch.tensor([[3e37, -3e37, 0.0]])
    assert torch.isfinite(fuse(huge, -huge)).all()
