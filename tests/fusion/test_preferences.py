"""Preferences and the weights of a step, against problems whose fronts and solutions are known."""

import itertools
import math

import pytest
import torch

from eutectic.errors import ParameterError
from eutectic.fusion._preferences import (
    best_vertex,
    corners_and_centre,
    dirichlet,
    exact,
    min_norm,
    preferred,
    simplex_grid,
    step_weights,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("k", "parts"), [(1, 4), (2, 10), (3, 10), (4, 3), (8, 1), (8, 2)])
def test_the_grid_is_every_preference_of_its_step_once_from_corner_to_corner(k, parts):
    grid = simplex_grid(k, parts)
    assert len(grid) == math.comb(parts + k - 1, k - 1)
    counts = grid * parts
    assert torch.equal(counts, counts.round())
    assert (grid >= 0).all()
    assert torch.equal(counts.sum(1), torch.full((len(grid),), float(parts), dtype=torch.float64))
    assert len({tuple(p) for p in grid.tolist()}) == len(grid)
    assert torch.equal(grid[0], torch.eye(k, dtype=torch.float64)[0])
    assert torch.equal(grid[-1], torch.eye(k, dtype=torch.float64)[-1])


def test_corners_and_centre():
    assert corners_and_centre(2).tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


@pytest.mark.parametrize("concentration", [0.5, 1.0, 4.0])
def test_dirichlet_samples_are_preferences_of_the_right_mean_and_spread_and_follow_their_key(concentration):
    k = 3
    drawn = torch.stack([dirichlet(k, concentration, 7, step) for step in range(3000)])
    assert (drawn >= 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(3000, dtype=torch.float64))
    torch.testing.assert_close(drawn.mean(0), torch.full((k,), 1 / k, dtype=torch.float64), rtol=0, atol=0.02)
    variance = (1 / k) * (1 - 1 / k) / (k * concentration + 1)
    torch.testing.assert_close(drawn.var(0), torch.full((k,), variance, dtype=torch.float64), rtol=0.1, atol=0)
    assert torch.equal(dirichlet(k, concentration, 7, 5), drawn[5])
    assert not torch.equal(dirichlet(k, concentration, 8, 5), drawn[5])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([1.2, -0.2], r"preference = \[1.2, -0.2\]: -0.2 is negative"),
        ({"a": -1e-3, "b": 1.001}, "-0.001 is negative"),
        ([0.5, 0.4], "the weights' sum is 0.9, not 1"),
        ({"a": 0.5}, "the weights' sum is 0.5, not 1"),
        ([0.5, 0.25, 0.25], "has 3 weights for 2 experts"),
        ({"A": 1.0}, r"there is no expert 'A'. Known: a, b"),
    ],
)
def test_what_is_no_preference_is_refused(given, says):
    with pytest.raises(ParameterError, match=says):
        preferred(given, ["a", "b"])


def test_a_preference_by_order_by_name_and_by_default():
    assert preferred([0.25, 0.75], ["a", "b"]).tolist() == [0.25, 0.75]
    assert preferred({"b": 0.75, "a": 0.25}, ["a", "b"]).tolist() == [0.25, 0.75]
    assert preferred({"b": 1}, ["a", "b"]).tolist() == [0, 1]
    assert preferred(None, ["a", "b", "c", "d"]).tolist() == [0.25] * 4
    assert preferred([0.3333333, 0.3333333, 0.3333333], ["a", "b", "c"]).sum() == pytest.approx(1)


# ── MGDA ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([[1, 0], [0, 1]], [0.5, 0.5]),
        ([[2, 0], [0, 1]], [0.2, 0.8]),
        ([[1, 0], [-1, 0]], [0.5, 0.5]),  # opposite: the point is on the front
        ([[1, 0], [3, 1]], [1, 0]),
        ([[0, 0], [3, 1]], [1, 0]),
        ([[1, 0], [-3, 0], [0, 5]], [0.75, 0.25, 0]),
    ],
)
def test_the_shortest_combination_of_few_gradients(gradients, expected):
    g = tensor(*gradients)
    torch.testing.assert_close(min_norm(g @ g.T), tensor(*expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("k", "q"), [(2, 5), (3, 2), (8, 3), (8, 7), (8, 40), (20, 30)])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e6])
def test_the_shortest_combination_meets_the_conditions_of_optimality(seed, k, q, scale):
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(k, q, generator=random, dtype=torch.float64) * torch.logspace(-2, 1, k, dtype=torch.float64)[:, None]
    g = scale * (g + (0.5 if seed % 2 else 0.0) * g.abs().max())
    alpha = min_norm(g @ g.T)
    assert (alpha >= 0).all()
    assert alpha.sum() == pytest.approx(1)
    d = alpha @ g
    assert (g @ d >= d @ d - 1e-9 * g.square().sum(1).max()).all()  # no loss goes up, at first order


def test_equal_and_vanishing_gradients_have_a_combination_too():
    for gram in (torch.ones(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)):
        alpha = min_norm(gram)
        assert (alpha >= 0).all()
        assert alpha.sum() == pytest.approx(1)
    assert min_norm(torch.full((2, 2), torch.nan, dtype=torch.float64)).sum() == 1  # and comes to an end


# ── descent on quadratics |x − cₖ|², whose front is the hull of the centres ───────────────────────────────────────────

CENTRES = {2: tensor([0, 0, 0], [2, 0, 1]), 3: tensor([0, 0, 0], [2, 0, 1], [0, 3, 1])}


def descended(how, p, steps=1000, lr=0.05, start=(3.0, -2.0, 4.0)):
    """Where descent ends, and all losses on the way there."""
    centres, x = CENTRES[len(p)], tensor(*start)
    losses = []
    for _ in range(steps):
        gradients = 2 * (x - centres)
        losses.append((x - centres).square().sum(1))
        x = x - lr * step_weights(how, gradients @ gradients.T, losses[-1], p) @ gradients
    return x, torch.stack(losses)


@pytest.mark.parametrize("p", [(0.3, 0.7), (1.0, 0.0), (0.2, 0.5, 0.3)])
def test_linear_scalarisation_ends_at_the_weighted_centre(p):
    x, _ = descended("linear", tensor(*p), 600)
    torch.testing.assert_close(x, tensor(*p) @ CENTRES[len(p)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_mgda_lowers_every_loss_at_every_step_and_ends_on_the_front(k):
    x, losses = descended("mgda", torch.full((k,), 1 / k, dtype=torch.float64))
    assert (losses.diff(dim=0) <= 1e-9).all()
    assert (losses[0] - losses[-1] > 1).all()
    gradients = 2 * (x - CENTRES[k])
    assert (min_norm(gradients @ gradients.T) @ gradients).norm() < 1e-3


@pytest.mark.parametrize(("p", "start"), [(0.1, (3, -2, 4)), (0.35, (3, -2, 4)), (0.5, (-1, 0.2, 0)), (0.9, (1.9, 0, 0.95))])
def test_epo_of_two_quadratics_ends_where_the_front_meets_the_ray(p, start):
    x, _ = descended("epo", tensor(p, 1 - p), lr=0.02, start=start)
    t = math.sqrt(1 - p) / (math.sqrt(p) + math.sqrt(1 - p))  # p t² = (1 − p) (1 − t)²
    torch.testing.assert_close(x, t * CENTRES[2][1], rtol=0, atol=0.03)


@pytest.mark.parametrize("p", [(0.4, 0.3, 0.3), (0.6, 0.2, 0.2)])
def test_epo_of_three_quadratics_ends_with_even_weighted_losses_on_the_front(p):
    x, losses = descended("epo", tensor(*p), lr=0.02)
    weighted = tensor(*p) * losses[-1]
    assert weighted.max() / weighted.min() < 1.1
    gradients = 2 * (x - CENTRES[3])
    assert (min_norm(gradients @ gradients.T) @ gradients).norm() < 0.15


def unevenness(p, losses):
    u = p * losses / (p * losses).sum()
    return float((u * (len(p) * u).log()).sum())


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_epo_evens_the_weighted_losses_out_or_raises_none(k, seed):
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(k, 30, generator=random, dtype=torch.float64)
    p = dirichlet(k, 2.0, seed)
    losses = torch.rand(k, generator=random, dtype=torch.float64) + 0.1
    alpha = exact(g @ g.T, losses, p)
    assert (alpha >= 0).all()
    assert alpha.sum() == pytest.approx(1)
    after = losses - 1e-6 * (g @ (alpha @ g))
    assert unevenness(p, after) < unevenness(p, losses)
    even = 1 / p.clamp(min=1e-3)
    assert (g @ (exact(g @ g.T, even, p) @ g) >= -1e-9).all()


@pytest.mark.parametrize("p", [(1.0, 0.0, 0.0), (0.0, 0.5, 0.5)])
def test_epo_at_the_edge_of_the_simplex_and_without_a_loss_is_finite(p):
    g = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for losses in (tensor(1, 2, 3), tensor(0, 0, 0), tensor(0, 1, 0), tensor(-1e-12, 1, 1)):
        for gram in (g @ g.T, torch.zeros(3, 3, dtype=torch.float64)):
            alpha = exact(gram, losses, tensor(*p))
            assert torch.isfinite(alpha).all()
            assert (alpha >= 0).all()
            assert alpha.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_vertex_is_the_best_of_all_points(seed):
    random = torch.Generator().manual_seed(seed)
    gain = torch.randn(3, generator=random, dtype=torch.float64)
    rows = torch.randn(2, 3, generator=random, dtype=torch.float64)
    least = tensor(-0.3, -math.inf) if seed % 2 else tensor(-0.3, -0.2)
    found = best_vertex(gain, rows, least)
    allowed = [p for p in simplex_grid(3, 60) if (rows @ p >= least).all()]
    if found is None:
        assert not allowed
        return
    assert (rows @ found >= least - 1e-8).all()
    best = max(float(gain @ p) for p in allowed)
    assert best - 1e-9 <= float(gain @ found) <= best + 0.15


def test_a_program_without_a_point_has_no_solution():
    assert best_vertex(tensor(1, 0), tensor([1, 1]), tensor(2)) is None
    for k in range(1, 4):
        assert best_vertex(torch.arange(k).double(), tensor([1.0] * k), tensor(-1)).tolist() == [0] * (k - 1) + [1]


def test_eight_objectives_take_no_long_time():
    g = torch.randn(8, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.full((8,), 1 / 8, dtype=torch.float64)
    gram, seen = g @ g.T, []
    for losses in itertools.repeat(torch.ones(8, dtype=torch.float64), 5):
        seen.append(exact(gram, losses, p))
    assert all(torch.equal(one, seen[0]) for one in seen)
