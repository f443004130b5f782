"""The links and measures that methods are chained from."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from eutectic.errors import ParameterError
from eutectic.methods import _measures
from eutectic.methods._measures import gram, kth_magnitude, magnitude_bits
from eutectic.methods._method import Method, Scope, Site, chain
from eutectic.methods._native import random_uint32
from eutectic.methods._transforms import disjoint_mean, drop, elect, scale_by, trim, weighted_sum

K, N, CUT = 5, 3 * 4096 + 123, 4096


def site(start=0, n=N, experts="abcde"):
    return Site("w", (n,), start, tuple(experts))


def vectors(k=K, n=N, seed=0):
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed))


def measured(measure, x_K, order, stats=None, split=None):
    """Observe the chunks in this order, in two halves that are then merged."""
    states = [measure.init(len(x_K)), measure.init(len(x_K))]
    for turn, i in enumerate(order):
        half = 0 if split is None or turn < split else 1
        chunk = x_K[:, i * CUT : (i + 1) * CUT]
        states[half] = measure.observe(states[half], chunk, site(i * CUT), stats or {})
    return measure.finish(measure.merge(*states))


# ── random numbers ────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = (0, "layer.weight", "expert")


def test_random_numbers_are_a_function_of_their_index():
    stream = random_uint32(KEY, 0, 5000)
    for start, n in [(0, 1), (1, 1), (7, 2), (8, 8), (9, 100), (4095, 3), (4999, 1), (123, 0)]:
        np.testing.assert_array_equal(random_uint32(KEY, start, n), stream[start : start + n])


@pytest.mark.parametrize("start", [2**31 - 3, 2**32 - 3, 2**40 + 5])
def test_random_numbers_far_into_the_stream(start):
    together = random_uint32(KEY, start, 20)
    one_by_one = [random_uint32(KEY, start + i, 1)[0] for i in range(20)]
    np.testing.assert_array_equal(together, one_by_one)
    assert len(set(together.tolist())) == 20


def test_random_numbers_are_uniform():
    n, bins = 200_000, 256
    numbers = random_uint32(KEY, 0, n)
    assert numbers.dtype == np.uint32
    assert abs(numbers.mean() / 2**32 - 0.5) < 4 / np.sqrt(12 * n)
    for part in (numbers >> 24, numbers & 255):
        chi2 = ((np.bincount(part, minlength=bins) - n / bins) ** 2 / (n / bins)).sum()
        assert abs(chi2 - (bins - 1)) < 4 * np.sqrt(2 * (bins - 1))
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(n)


def test_random_numbers_differ_by_seed_tensor_and_expert():
    keys = [(seed, tensor, expert) for seed in (0, 1) for tensor in ("w", "v") for expert in ("a", "b")]
    keys += [(0, "wa", ""), (0, "", "wa")]
    streams = [random_uint32(key, 0, 4000).astype(float) for key in keys]
    for (i, a), (j, b) in itertools.combinations(enumerate(streams), 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.08, (keys[i], keys[j])


def test_random_numbers_are_pinned():
    # a saved recipe must give the same merge in the next release
    assert random_uint32((0, "w", "a"), 0, 4).tolist() == [291988204, 650379752, 756851095, 3743272153]


# ── links ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dropping_keeps_the_share_and_the_mean():
    x_K, density = torch.ones(2, 100_000), 0.2
    kept_K = drop(density, 3).apply(x_K, site(n=100_000, experts="ab"), {})
    assert set(kept_K.unique().tolist()) == {0.0, 5.0}
    share_K = (kept_K != 0).double().mean(1)
    assert torch.all((share_K - density).abs() < 4 * (density * (1 - density) / 100_000) ** 0.5)
    both = ((kept_K[0] != 0) & (kept_K[1] != 0)).double().mean()
    assert abs(both - density**2) < 0.005  # the experts' coins are independent


def test_dropping_everything_is_refused():
    with pytest.raises(ParameterError, match="density"):
        drop(0.0, 0)
    assert torch.equal(drop(1.0, 0).apply(vectors(), site(), {}), vectors())


def test_election_with_a_total_of_zero_elects_nobody():
    x_K = torch.tensor([[1.0, 2.0, 0.0, -3.0], [-1.0, -1.0, 0.0, -1.0]])
    assert elect().apply(x_K, site(), {}).tolist() == [[0, 2, 0, -3], [0, 0, 0, -1]]


def test_disjoint_mean_counts_what_is_not_zero():
    x_K = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    assert disjoint_mean().apply(x_K, site(), {}).tolist() == [2, 2, 0]


@pytest.mark.parametrize("k", [1, 3, 4, 8, 9, 20])
@pytest.mark.parametrize(
    "make",
    [
        lambda k: weighted_sum(0.3),
        lambda k: weighted_sum([0.1 * i - 0.3 for i in range(k)]),
        lambda k: disjoint_mean(),
        lambda k: chain(elect(), disjoint_mean()),
    ],
    ids=["sum", "weighted", "disjoint_mean", "elect"],
)
def test_sums_do_not_depend_on_the_neighbours(make, k):
    link, x_K = make(k), vectors(k, 4211)
    whole = link.apply(x_K, site(), {})
    for start, stop in [(0, 1), (1, 2), (0, 3), (5, 12), (17, 4099), (3, 4211), (4210, 4211)]:
        part = link.apply(x_K[:, start:stop].clone(), site(start), {})
        assert torch.equal(part, whole[start:stop]), (start, stop)


def test_trim_of_nothing_and_everything_costs_no_pass():
    assert trim(0.0, "tensor").measures == trim(1.0, "model").measures == ()
    assert not trim(0.0, "tensor").apply(vectors(), site(), {}).any()
    assert torch.equal(trim(1.0, "tensor").apply(vectors(), site(), {}), vectors())


# ── chains ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(method, x_K):
    stats = {}
    for measure in method.measures:
        stats[measure.key] = measure.finish(measure.observe(measure.init(len(x_K)), x_K, site(), dict(stats)))
    return method.apply(x_K, site(), stats)


def test_a_chain_measures_what_the_links_before_hand_on():
    x_K = vectors()
    shifted = Method(lambda x, site, stats: x + 2)
    wanted = run(trim(0.3, "tensor"), x_K + 2)
    assert torch.equal(run(chain(shifted, trim(0.3, "tensor")), x_K), wanted)
    assert torch.equal(run(chain(chain(shifted), chain(scale_by(1.0), trim(0.3, "tensor")), scale_by(1.0)), x_K), wanted)


def test_two_measuring_links_do_not_mix_their_stats():
    x_K = vectors()
    twice = chain(trim(0.5, "tensor"), Method(lambda x, site, stats: -3 * x), trim(0.1, "tensor"))
    assert len({measure.key for measure in twice.measures}) == len(twice.measures) == 4
    assert torch.equal(run(twice, x_K), -3 * run(trim(0.1, "tensor"), x_K))


def test_the_widest_scope_wins():
    def link(scope):
        return Method(lambda x, site, stats: x, scope)

    assert chain(link(Scope.ELEMENT), link(Scope.ROW)).scope is Scope.ROW
    assert chain(link(Scope.TENSOR), link(Scope.ELEMENT)).scope is Scope.TENSOR
    assert chain(link(Scope.ELEMENT), space="weight", experts=(2, 2)).experts == (2, 2)


# ── measures are monoids ──────────────────────────────────────────────────────────────────────────────────────────────


def orders():
    chunks = list(range(-(-N // CUT)))
    for seed in range(4):
        shuffled = random.Random(seed).sample(chunks, len(chunks))
        for split in range(len(chunks) + 1):
            yield shuffled, split


def test_gram_is_the_same_bits_in_any_order():
    x_K = vectors()
    wanted = gram().finish(gram().observe(gram().init(K), x_K, site(), {}))
    torch.testing.assert_close(wanted, x_K.double() @ x_K.double().T, rtol=1e-13, atol=1e-9)
    for order, split in orders():
        assert torch.equal(measured(gram(), x_K, order, split=split), wanted)


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["continuous", "ties", "zeros"])
@pytest.mark.parametrize("few", [0, N // 2, 1 << 16])
def test_kth_magnitude_is_a_sort_in_any_order(density, kind, few, monkeypatch):
    monkeypatch.setattr(_measures, "_FEW", few)  # held as they are, or poured into histograms, or both in turn
    x_K = vectors()
    if kind != "continuous":
        x_K = (x_K * 4).round() / 4
    if kind == "zeros":
        x_K[1:] *= torch.rand(K - 1, N, generator=torch.Generator().manual_seed(1)) < 0.05
        x_K[2] = -0.0
    rank = max(1, round(density * N))
    wanted = x_K.abs().sort(dim=1, descending=True).values[:, rank - 1]
    high, low = kth_magnitude(density, "tensor")
    for order, split in itertools.islice(orders(), 0, None, 3):
        stats = {"high": measured(high, x_K, order, split=split)}
        found = measured(low, x_K, order, stats, split)
        assert torch.equal(found.view(torch.float32), wanted)
        assert torch.equal(magnitude_bits(x_K) >= found[:, None], x_K.abs() >= wanted[:, None])


@pytest.mark.parametrize(("n", "density"), [(100_000_007, 0.3), (2**31, 0.2), (70_000_000_001, 0.2)])
def test_ranks_are_exact_in_models_of_any_size(n, density):
    high, _ = kth_magnitude(density, "model")
    counts = torch.zeros(1, 1 << 15, dtype=torch.int64)
    counts[0, 77] = n
    found = high.finish(high.init(1)._replace(counts_QB=counts))
    assert (found.high_Q.item(), found.rest_Q.item()) == (77, round(density * n))
