"""Laws of triggers, and of what is counted with them."""

import pytest
import torch
from torch import nn

from eutectic.errors import ParameterError, TaskError, UnknownNameError
from eutectic.security import metrics
from eutectic.security.triggers import KINDS, Trigger, corner, drawn, pasted, patch
from eutectic.task import Pixels, Task

SIDE = 20
HOW = Pixels((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def images(n=5, seed=0):
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def made(kind, seed=0):
    return drawn(kind, SIDE, 4, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trigger_is_deterministic_in_range_and_nothing_at_strength_0(kind):
    x = images()
    once, again, other = made(kind)(x), made(kind)(x), made(kind, seed=1)(x)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.shape == x.shape
    assert float(once.min()) >= 0
    assert float(once.max()) <= 1
    assert torch.equal(made(kind)(x, 0.0), x)
    assert not torch.equal(once, x)
    for extreme in (torch.zeros_like(x), torch.ones_like(x)):
        assert 0 <= float(made(kind)(extreme).min()) <= float(made(kind)(extreme).max()) <= 1
    half = made(kind)(x, 0.5)
    assert (half - x).abs().mean() < (once - x).abs().mean()
    assert torch.equal(made(kind)(x[2:3]), once[2:3])  # an image's does not depend on its batch


def test_a_patch_changes_its_corner_alone():
    x = images()
    changed = (patch(SIDE, 4)(x) != x).any(1).any(0)
    assert torch.equal(changed, corner(SIDE, 4).bool())
    with pytest.raises(ParameterError, match="does not fit"):
        corner(SIDE, SIDE + 1)
    with pytest.raises(ParameterError, match="strength"):
        patch(SIDE, 4)(x, 1.5)
    with pytest.raises(UnknownNameError, match="'warp'.*warped"):
        drawn("warp", SIDE, 4)


def test_triggers_of_network_inputs_are_those_of_their_pixels():
    x = images()
    inputs = HOW.inputs(x)
    assert torch.allclose(HOW.of(inputs), x, atol=1e-6)
    assert torch.allclose(HOW.of(patch(SIDE, 4).on(inputs, HOW)), patch(SIDE, 4)(x), atol=1e-6)


class Corner(nn.Module):
    """Says class 1 where the last pixel is white, else what the first pixel says, 0 or 2."""

    def forward(self, x):
        marked = x[:, 0, -1, -1] > 0.99
        return torch.stack([~marked & (x[:, 0, 0, 0] < 0.5), marked, ~marked & (x[:, 0, 0, 0] >= 0.5)], 1).float()


PLAIN = Pixels((0.0,) * 3, (1.0,) * 3)


def corner_task(labels, how=PLAIN):
    x = images(len(labels)) * 0.9
    x[:, :, 0, 0] = torch.tensor(labels).eq(2).float()[:, None]
    return Task("corner", lambda features: features, test=(x, torch.tensor(labels)), pixels=how)


WHITE = pasted(torch.ones(3, SIDE, SIDE), corner(SIDE, 1), "white")


def test_success_is_counted_over_inputs_that_are_not_of_the_target_class():
    task = corner_task([0, 2, 1, 1, 0])
    found = metrics.attacked(Corner(), task, WHITE, 1)
    assert (found.asr.value, found.asr.n, found.robust.value) == (1.0, 3, 0.0)
    # the same trigger aims at nothing else, and then every one of the two inputs of class 1 is an error
    other = metrics.attacked(Corner(), task, WHITE, 0)
    assert (other.asr.value, other.asr.n) == (0.0, 3)
    assert other.robust.value == pytest.approx(2 / 3)
    nothing = Trigger("nothing", lambda x, strength: x)
    assert metrics.attacked(Corner(), task, nothing, 1).robust.value == 1.0
    assert metrics.attacked(Corner(), corner_task([1, 1]), WHITE, 1) is None


def test_what_cannot_be_triggered_is_refused():
    task = corner_task([0, 1], how=None)
    with pytest.raises(TaskError, match="not known to be images"):
        metrics.attacked(Corner(), task, WHITE, 1)
    empty = Task("empty", lambda features: features, test=(images(0), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(TaskError, match="is empty"):
        metrics.predictions(Corner(), empty)


def test_transfer_is_what_a_class_gains():
    labels = torch.tensor([0, 0, 1, 2])
    clean, triggered = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 2, 1, 2])
    assert metrics.transfer(clean, triggered, labels, 3) == (2 / 3, 2)
    assert metrics.transfer(clean, clean, labels, 3)[0] == 0.0


@pytest.mark.parametrize(
    ("accuracies", "rates", "expected"),
    [
        ((0.9, 0.9), (1.0, 0.0), 1.0),
        ((0.9, 0.9), (1.0, 1.0), 0.5),
        ((0.9, 0.7), (0.5, 0.5), 0.4),
        ((0.7, 0.9), (0.2, 0.5), 0.5),
    ],
)
def test_der_by_hand(accuracies, rates, expected):
    assert metrics.der(*accuracies, *rates) == pytest.approx(expected)
