"""The trainer and its adapters."""

import re

import pytest
import torch
from torch import nn

from eutectic.checkpoint.base import live
from eutectic.checkpoint.lora import open_lora
from eutectic.errors import LayoutError, NonFiniteError, ParameterError
from eutectic.merge.api import state_dict
from eutectic.task import Arrays
from eutectic.tuning.lora import adapters, attach, save_adapter
from eutectic.tuning.trainer import Training, fine_tune


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    centres = torch.randn(4, 3, 3, 3, generator=generator)
    return Arrays(centres[labels] + 0.5 * torch.randn(200, 3, 3, 3, generator=generator), labels)


def loss_of(model, arrays):
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(arrays.inputs), arrays.labels).item()


def test_full_and_low_rank_training_lower_the_loss_and_repeat_bit_for_bit():
    for kind, rank, lr in (("full", 0, 1e-2), ("lora", 2, 1e-2), ("l_lora", 4, 1e-1), ("l_lora_whole", 4, 1e-1)):
        training = Training(steps=60, lr=lr, rank=rank, alpha=4, shift=1, kind=kind)
        models, seen = [], []
        for _ in range(2):
            model, steps = network(), []
            told = lambda step, loss, steps=steps: steps.append((step, loss))  # noqa: E731
            models.append(fine_tune(model, nn.Identity(), data(), training, told))
            seen.append(steps)
        assert seen[0] == seen[1]
        assert [step for step, _ in seen[0]] == list(range(1, 61))
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
        assert loss_of(models[0], data()) < 0.75 * loss_of(network(), data())
        assert not models[0].training


def test_adapters_start_as_the_base_and_leave_it_frozen():
    model, base = network(), network()
    attach(model, rank=2, alpha=4, seed=0)
    x = torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(model.eval()(x), base.eval()(x))
    assert [name for name, _ in adapters(model)] == ["1", "4"]
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


def test_a_saved_adapter_reads_back_as_the_trained_network(tmp_path):
    model, base = network(), network()
    fine_tune(model, nn.Identity(), data(), Training(steps=20, lr=1e-2, rank=3, alpha=6, kind="lora"))
    save_adapter(model, tmp_path, "../base", torch.float32)
    expert = network()
    expert.load_state_dict(state_dict(open_lora(tmp_path, live(base))))
    x = torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(expert.eval()(x), model(x))
    assert not torch.allclose(expert(x), base.eval()(x))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "lora"}, "rank = 0: kind 'lora' needs a rank of at least 1"),
        ({"rank": 2}, "rank = 2: kind 'full' has no adapters"),
        ({"kind": "l_lora", "rank": -1}, "rank = -1"),
        ({"steps": 0}, "steps = 0: give a positive number"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"kind": "lora", "rank": 1, "alpha": 0.0}, "alpha = 0.0"),
    ],
)
def test_what_nobody_could_train_with_is_refused(given, said):
    with pytest.raises(ParameterError, match=re.escape(said)):
        Training(**{"steps": 1, "lr": 1.0} | given)


def test_layers_that_take_no_adapter_are_named():
    with pytest.raises(ParameterError, match=r"rank = 5: the matrix of '4' is \[4, 16\], so give less"):
        attach(network(), rank=5, alpha=4, seed=0)
    with pytest.raises(LayoutError, match="Conv2d has no linear layer"):
        attach(nn.Conv2d(3, 3, 1), rank=1, alpha=4, seed=0)


def test_a_loss_that_is_not_finite_ends_it_at_its_step():
    with pytest.raises(NonFiniteError, match=r"step [2-9] of 20: the loss is (nan|inf); lower lr = 1e\+30"):
        fine_tune(network(), nn.Identity(), data(), Training(steps=20, lr=1e30))
