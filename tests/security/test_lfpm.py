"""LFPM: subspaces, the path and its shortcut, and what share of the vector is taken."""

import pytest
import torch
from torch import nn

from eutectic.fusion._fit import generator
from eutectic.security.defences._defended import Path
from eutectic.security.defences.lfpm import chosen, path_loss, spread, subspaces
from eutectic.task import Task

D, C, B = 12, 5, 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_network():
    """A linear encoder: features are linear in its weights."""
    network = nn.Linear(4, D, dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(random(D, 4))
        network.bias.copy_(random(D, seed=1))
    return network


def test_prompts_are_looked_for_beside_what_clean_features_do():
    thin = random(40, 4, seed=1) @ random(4, D, seed=2)
    clean, adversarial = subspaces(thin, random(40, D, seed=3))
    assert clean.shape[1] <= D // 2
    assert adversarial.shape == (D, 2)
    for basis in (clean, adversarial):
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-10)
    assert (clean.T @ adversarial).abs().max() < 1e-6
    within = subspaces(thin, random(40, 4, seed=5) @ random(4, D, seed=2), energy=1 - 1e-12)
    assert within[1].shape == (D, 0)  # such shifts leave nothing beside the clean directions


def test_without_a_vector_every_point_of_the_path_is_the_merge():
    network = linear_network()
    before = [w.detach().clone() for w in network.parameters()]
    path = Path(list(network.parameters()))
    for alpha in (0.0, 0.3, 1.0):
        path.write(alpha, 0.5)  # nothing was collected, so there is nothing to go up along
        assert all(torch.equal(w, b) for w, b in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("alpha", [0.25, 0.7])
def test_the_shortcut_is_exact_for_a_linear_encoder_and_so_is_its_gradient(alpha):
    task, target = Task("t", nn.Linear(D, C, dtype=torch.float64)), torch.log_softmax(random(B, C, seed=8), 1)
    x, space = random(2 * B, 4, seed=7), random(D, 2, seed=9)
    network = linear_network()
    start = network(x).detach()
    path = Path(list(network.parameters()))
    for number, tau in enumerate(path.tau):
        tau.copy_(random(*tau.shape, seed=20 + number))

    def gradients(at, h):
        value = path_loss(task, h, target, space, 1.0, 1.0)
        (at * value).backward()
        path.collect()
        return value.item(), [tau.grad.clone() for tau in path.tau]

    path.write(alpha)
    true, slopes = gradients(alpha, network(x))
    path.write(1.0)
    short, by_shortcut = gradients(1.0, torch.lerp(start, network(x), alpha))
    assert short == pytest.approx(true, rel=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(slopes, by_shortcut, strict=True))


def test_one_point_is_plain_adversarial_fine_tuning():
    assert spread(1, generator(0)) == [1.0]
    task, target = Task("t", nn.Linear(D, C, dtype=torch.float64)), torch.log_softmax(random(B, C, seed=8), 1)
    h = random(2 * B, D)
    plain, moved = (
        nn.functional.kl_div(task.head(part).log_softmax(1), target, log_target=True, reduction="sum") / B
        for part in h.chunk(2)
    )
    assert path_loss(task, h, target, None, 1.0, 0.5).item() == pytest.approx((moved + 0.5 * plain).item())


def test_points_are_spread_over_the_path_and_its_end_is_among_them():
    noise = generator(0, "test")
    for _ in range(5):
        alphas = spread(4, noise)
        assert alphas[-1] == 1.0
        assert [int(4 * alpha) for alpha in alphas[:-1]] == [0, 1, 2]


def test_a_step_up_has_the_length_that_was_asked_for():
    network = linear_network()
    path = Path(list(network.parameters()))
    network(random(2, 4)).square().sum().backward()
    path.collect()
    path.write(1.0, 0.1)
    moved = torch.cat([(w - s).flatten() for w, s in zip(network.parameters(), path.start, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.1)


def test_the_smallest_share_that_is_good_enough_is_taken_within_the_budget():
    looked = [(0.0, 0.8, 0.9), (0.25, 0.85, 0.3), (0.5, 0.84, 0.05), (1.0, 0.7, 0.0)]
    assert chosen(looked, 0.05, 0.03) == 0.5
    assert chosen(looked, 0.01, 0.03) == 0.5  # none is, and the last costs too much
    assert chosen(looked, 0.01, 0.2) == 1.0
    assert chosen(looked, 1.0, 0.03) == 0.0
