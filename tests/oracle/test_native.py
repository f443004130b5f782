"""The compiled loops and their counterparts in array operations give the same bits."""

import numpy as np
import pytest
import torch

from eutectic.methods import _native

pytestmark = pytest.mark.skipif(_native.LIBRARY is None, reason="built without a compiler")
SIZES = (0, 1, 31, 32, 1023, 1025, 4096, 12_345)


def both(monkeypatch, work):
    """What it gives compiled, and what without."""
    compiled = work()
    monkeypatch.setattr(_native, "LIBRARY", None)
    return compiled, work()


def same(a, b):
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) if isinstance(x, torch.Tensor) else np.array_equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def vector(n, seed=0, ties=False):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return (x * 4).round() / 4 if ties else x


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 3e38])
def test_widening_and_rounding(n, dtype, bad, monkeypatch):
    x, base = vector(n).to(dtype), vector(n, 1)
    base[::3] = 0
    if bad and n:
        x[n // 2] = bad

    def work():
        out, plain, rounded, alone = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype)
        whole = [_native.widen(x, base, out), _native.widen(x, None, plain)]
        whole += [_native.narrow(out, base, rounded), _native.narrow(plain, None, alone)]
        # what is not finite is refused, so only that it was found must agree
        return [whole, out, plain, *([rounded, alone] if all(whole) else [])]

    assert same(*both(monkeypatch, work))


def test_an_entry_that_does_not_change_is_the_bases_to_the_bit(monkeypatch):
    base, out = torch.tensor([-0.0, 0.0, 1.0]), torch.empty(3)
    for _ in range(2):
        assert _native.narrow(torch.zeros(3), base, out)
        assert torch.equal(out.view(torch.int32), base.view(torch.int32))
        monkeypatch.setattr(_native, "LIBRARY", None)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("weights", [None, [0.3, -1.0, 0.1]])
def test_sums(n, weights, monkeypatch):
    x_K = torch.stack([vector(n, seed) for seed in range(3)])
    assert same(*both(monkeypatch, lambda: [_native.total(x_K, weights)]))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ties", [False, True])
def test_counts_and_bands(n, ties, monkeypatch):
    x = vector(n, ties=ties)
    bits = x.view(torch.int32)

    def work():
        high, low = torch.ones(1 << 15, dtype=torch.int64), torch.zeros(1 << 16, dtype=torch.int64)
        _native.count_high(bits, high)
        _native.count_low(bits, int(high.argmax()), low)
        return [high, low, _native.band(x, 0x3F000000, 0x3F800000), _native.band(x, 0x3F000000)]

    found = both(monkeypatch, work)
    assert same(*found)
    assert found[0][0].sum() == n + (1 << 15)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("weights", [None, [0.3, -1.0, 0.0, 2.5, 1e-20]])
def test_sums_over_experts_and_entries(n, k, weights, monkeypatch):
    x_K = torch.stack([vector(n, seed, ties=seed % 2 == 0) for seed in range(k)])
    chosen = weights and weights[:k]
    compiled, plain = both(
        monkeypatch, lambda: [_native.agree(x_K, chosen) + 0.0, _native.spread(x_K), _native.dots(x_K[0], x_K[-1])]
    )
    assert same(compiled, plain)


@pytest.mark.parametrize("start", [0, 1, 7, 8, 4096, 2**40 + 3])
@pytest.mark.parametrize("n", SIZES)
def test_random_numbers(n, start, monkeypatch):
    assert same(*both(monkeypatch, lambda: [_native.random_uint32((0, "w", "a"), start, n)]))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [1e-9, 0.3, 0.5, 1 - 1e-12, 1.0])
def test_tosses(n, p, monkeypatch):
    x, coins = vector(n), _native.random_uint32((1, "w", "a"), 0, n)
    assert same(*both(monkeypatch, lambda: [_native.toss(x, coins, p)]))


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (1, 4097), (7, 33), (2, 2048), (0, 5)])
@pytest.mark.parametrize("kind", ["any", "ties", "equal", "bfloat16", "wide"])
def test_tosses_by_rank(rows, kind, monkeypatch):
    x = vector(rows[0] * rows[1], ties=kind == "ties").view(rows)
    if kind == "equal":
        x = torch.full(rows, -2.0)
    if kind == "bfloat16":
        x = x.bfloat16().float()
    if kind == "wide":
        x = torch.exp(20 * x) * x.sign()
    coins = _native.random_uint32((1, "w", "a"), 0, x.numel())
    assert same(*both(monkeypatch, lambda: [_native.magprune(x, coins, 0.4, 0.2 / max(1, rows[1] - 1))]))
