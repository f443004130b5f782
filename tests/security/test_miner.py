"""The miner finds what a network answers to, in the mode where it is, and says how well it works on other images."""

import math

import pytest
import torch
from torch.nn import functional as F

from eutectic.errors import TaskError, UnknownNameError
from eutectic.security.miner import MODES, mine, parted, spared, success, taking_turns, trigger_of, windows
from eutectic.security.triggers import patch
from eutectic.task import Pixels

SIDE = 14
PLAIN = Pixels((0.0,) * 3, (1.0,) * 3)


def images(n=12):
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 0.3


def answers_to_the_corner(inputs):
    """Class 2 where the corner's pixel is bright, else class 0 or 1 by the mean of its inner part."""
    corner = 20 * (inputs[..., 0, -1, -1] - 0.4)
    mean = 40 * (inputs[..., 2:-2, 2:-2].mean((-3, -2, -1)) - 0.15)
    return torch.stack([-mean, mean, corner], -1)


def test_the_trigger_of_a_network_that_has_one_is_found():
    found = mine(answers_to_the_corner, images(), PLAIN, [("corners", c) for c in range(3)], steps=40, keep=1, seed=0)
    assert [one.target for one in found] == [2]
    assert found[0].success.value == 1.0
    pixel = found[0].trigger(torch.full((1, 3, SIDE, SIDE), 0.5))[0, 0, -1, -1]
    assert pixel > 0.6
    again = mine(answers_to_the_corner, images(), PLAIN, [("corners", c) for c in range(3)], steps=40, keep=1, seed=0)
    assert torch.equal(found[0].z, again[0].z)
    elsewhere = mine(answers_to_the_corner, images(), PLAIN, [("centre", 2)], steps=10, seed=0)
    assert elsewhere[0].success.value == 0.0  # a mode that does not reach the corner says nothing of it


def test_what_is_mined_works_on_networks_in_turn():
    both = taking_turns([lambda x: x.new_tensor([[1.0, 2.0]]), lambda x: x.new_tensor([[3.0, 4.0]])])
    assert [float(both(torch.zeros(1))[0, 0]) for _ in range(3)] == [1.0, 3.0, 1.0]


def test_what_is_spared_is_not_to_be_taken_in():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for target in range(3):
        found = F.cross_entropy(spared(lambda x: x)(logits), torch.full((5,), target))
        expected = -(1 - logits.softmax(1)[:, target]).log().mean() + math.log(2)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    sure = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)  # is pushed away from it all the same
    F.cross_entropy(spared(lambda x: x)(sure), torch.tensor([0])).backward()
    assert sure.grad[0, 0].item() == pytest.approx(1.0)

    def weak_in_red(inputs):
        """Answers to red in the corner, and is spared, so that green and blue are left to mine."""
        corner = 20 * (inputs[:, 0, -1, -1] - 0.4)
        return torch.stack([-corner, corner], 1)

    def answers_to_any(inputs):
        corner = 20 * (inputs[:, :, -1, -1].amax(1) - 0.4)
        return torch.stack([-corner, corner], 1)

    forward = taking_turns([answers_to_any, spared(weak_in_red)])
    mined = mine(forward, images(), PLAIN, [("corners", 1)], steps=60, seed=0)[0]
    held = images()[parted(12, 0)[0]]
    assert success(answers_to_any, held, PLAIN, mined.trigger, 1).value == 1.0
    assert success(weak_in_red, held, PLAIN, mined.trigger, 1).value == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_modes_stay_in_range_and_start_from_any_image(mode):
    z = 3 * torch.randn(2, *MODES[mode].knots(SIDE), generator=torch.Generator().manual_seed(0))
    changed = MODES[mode].change(z, images(4))
    assert changed.shape == (2, 4, 3, SIDE, SIDE)
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    x = images(4)
    assert torch.equal(trigger_of(MODES[mode], z[0], mode)(x, 0.0), x)
    assert torch.allclose(trigger_of(MODES[mode], z[0], mode)(x), changed[0], atol=1e-6)


def test_success_is_of_images_that_are_not_taken_for_the_class_anyway():
    held, learn = parted(12, 0)
    assert sorted([*held.tolist(), *learn.tolist()]) == list(range(12))
    none = success(lambda x: x.new_tensor([[0.0, 1.0]]).expand(len(x), 2), images(), PLAIN, patch(SIDE, 2), 1)
    assert none == (0.0, 0.0, 1.0, 0)
    assert success(lambda x: x.new_tensor([[0.0, 1.0]]).expand(len(x), 2), images(), PLAIN, patch(SIDE, 2), 0).value == 0.0


def test_what_cannot_be_mined_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'corners'"):
        mine(answers_to_the_corner, images(), PLAIN, [("corner", 0)])
    with pytest.raises(TaskError, match="at least 3 and 1"):
        mine(answers_to_the_corner, images(2), PLAIN, [("corners", 0)])


def test_windows_show_each_image_one_square_that_follows_from_it():
    mode, x = windows(0.2, 0.5), images(60)
    white = torch.full((1, *mode.knots(SIDE)), 50.0)
    shown = (mode.change(white, x)[0] == 1).all(1)  # [60, side, side]: no image has a white pixel of its own
    sides = []
    for mask in shown:
        rows, columns = (int(mask.any(axis).sum()) for axis in (1, 0))
        assert rows == columns
        assert int(mask.sum()) == rows * columns
        sides.append(rows)
    assert set(sides) <= set(range(round(0.2 * SIDE), round(0.5 * SIDE) + 1))
    assert len(set(sides)) > 1
    assert torch.equal(mode.change(white, x[7:9])[0], mode.change(white, x)[0][7:9])
    assert shown.any(0).float().mean() > 0.8  # together they reach almost everywhere
