"""TIES against sorts and loops, and against examples worked out by hand."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import naive

from eutectic.merge.api import merge, state_dict

# Three task vectors, worked out by hand.  Of five entries density 0.4 keeps two:
#   τ₁ = [ 3.0  -1.0   0.5   2.0   0.1 ]  →  [ 3   0   0   2   0 ]
#   τ₂ = [-2.0  -4.0   0.3   1.0   0.0 ]  →  [-2  -4   0   0   0 ]
#   τ₃ = [ 1.0   0.2  -5.0  -6.0   0.1 ]  →  [ 0   0  -5  -6   0 ]
#                                   mass      [ 1  -4  -5  -4   0 ]
#                    mean of those that agree [ 3  -4  -5  -6   0 ]
TAUS = [[3.0, -1.0, 0.5, 2.0, 0.1], [-2.0, -4.0, 0.3, 1.0, 0.0], [1.0, 0.2, -5.0, -6.0, 0.1]]
MERGED = [3.0, -4.0, -5.0, -6.0, 0.0]


def zeros(*names, n=5):
    return {name: torch.zeros(n) for name in names}


def test_worked_example():
    experts = [{"w": torch.tensor(tau)} for tau in TAUS]
    for over in ("tensor", "model"):
        found = state_dict(merge("ties", zeros("w"), experts, density=0.4, over=over))
        assert found["w"].tolist() == MERGED
        assert naive.ties(zeros("w"), experts, 0.4, 1.0, over)["w"].tolist() == MERGED
    found = state_dict(merge("ties", zeros("w"), experts, density=0.4, scale=0.5))
    assert found["w"].tolist() == [value / 2 for value in MERGED]


def test_worked_example_over_the_model():
    # beside v, which is ten times as large, w keeps nothing: four of ten entries of each vector lie in v
    experts = [{"w": torch.tensor(tau), "v": torch.tensor([10.0, 20.0, 30.0, 40.0, 0.0])} for tau in TAUS]
    over_model = state_dict(merge("ties", zeros("w", "v"), experts, density=0.4, over="model"))
    assert over_model["w"].tolist() == [0.0] * 5
    assert over_model["v"].tolist() == [10.0, 20.0, 30.0, 40.0, 0.0]
    over_tensor = state_dict(merge("ties", zeros("w", "v"), experts, density=0.4, over="tensor"))
    assert over_tensor["w"].tolist() == MERGED
    assert over_tensor["v"].tolist() == [0.0, 0.0, 30.0, 40.0, 0.0]


@pytest.mark.parametrize("over", ["tensor", "model"])
@pytest.mark.parametrize("weights", [None, [0.5, -1.0, 2.0]])
def test_the_sum_is_that_of_the_elected_entries_and_weights_have_no_say_in_the_vote(over, weights):
    # of the trimmed vectors above (over the model, u takes none of the places)
    elected = torch.tensor([[3.0, 0.0, 0.0, 0.0, 0.0], [0.0, -4.0, 0.0, 0.0, 0.0], [0.0, 0.0, -5.0, -6.0, 0.0]])
    experts = [{"w": torch.tensor(tau), "u": torch.zeros(1)} for tau in TAUS]
    base = zeros("w") | zeros("u", n=1)
    given = {} if weights is None else {"weights": weights}
    density = 0.4 if over == "tensor" else 2 / 6
    found = state_dict(merge("ties_sum", base, experts, density=density, scale=0.5, over=over, **given))
    expected = 0.5 * (torch.tensor(weights or [1.0, 1.0, 1.0])[:, None] * elected).sum(0)
    assert found["w"].tolist() == expected.tolist()


def test_agreeing_experts_are_averaged_over_those_that_have_a_say():
    # at 0: (2 + 4) / 2, the third is silent; at 1: mass −1, so only −5 counts; at 2: votes cancel, nobody is elected
    experts = [{"w": torch.tensor(tau)} for tau in ([2.0, 4.0, 3.0], [4.0, -5.0, -3.0], [0.0, 0.0, 0.0])]
    found = state_dict(merge("ties", zeros("w", n=3), experts, density=1))
    assert found["w"].tolist() == [3.0, -5.0, 0.0]


def test_entries_that_tie_with_the_threshold_are_all_kept():
    experts = [{"w": torch.tensor([1.0, -1.0, 1.0, 0.5, 0.0])}]
    found = state_dict(merge("ties", zeros("w"), experts, density=0.2))
    assert found["w"].tolist() == [1.0, -1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("over", ["tensor", "model"])
@pytest.mark.parametrize("density", [0, 1e-9, 0.01, 0.2, 0.5, 0.97, 1])
@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "ties"])
def test_ties(over, density, grid, assert_close):
    base = naive.random_model(0, grid)
    experts = naive.fine_tunes(base, 5, grid=grid)
    found = state_dict(merge("ties", base, experts, density=density, scale=0.7, over=over))
    assert_close(found, naive.ties(base, experts, density, 0.7, over), 1e-6)
    if density == 0:
        assert all(torch.equal(found[name], base[name]) for name in base)


def test_the_share_that_is_kept(assert_close):
    base = naive.random_model(0)
    (expert,) = naive.fine_tunes(base, 1, seed=7)
    expert["b"] = base["b"] + 1.5 + torch.rand(64, generator=torch.Generator().manual_seed(0))
    found = state_dict(merge("ties", base, [expert], density=0.3, over="tensor"))
    for name in ("a", "b", "f"):
        changed = int((found[name] != base[name]).sum())
        assert changed == max(1, round(0.3 * base[name].numel())), name
    over_model = state_dict(merge("ties", base, [expert], density=0.3, over="model"))
    total = sum(tensor.numel() for tensor in base.values())
    assert sum(int((over_model[name] != base[name]).sum()) for name in base) == round(0.3 * total)


def test_the_signs_are_the_elected_ones():
    base = naive.random_model(0, grid=True)
    experts = naive.fine_tunes(base, 4, grid=True)
    taus = naive.task_vectors(base, experts)
    found = state_dict(merge("ties", base, experts, density=1))
    for name in base:
        mass = sum(tau[name] for tau in taus)
        assert torch.equal((found[name] - base[name]).sign().double(), mass.sign())
