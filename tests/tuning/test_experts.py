"""Experts in memory: of any network and task, ready to be merged."""

import pytest
import torch
from torch import nn

import eutectic as eu
from eutectic.errors import NonFiniteError, TaskError
from eutectic.task import Arrays, Task
from eutectic.tuning.lora import adapters, attach
from eutectic.tuning.tangent import Tangent, tangent_at


class Inner(nn.Module):
    """Its names are those of what it wraps, as those of networks whose folder knows nothing of a pooling."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def state_dict(self, *args, **kwargs):
        return self.network.state_dict(*args, **kwargs)


def network():
    torch.manual_seed(0)
    return Inner(nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.GELU(), nn.Linear(16, 4)))


def task():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    inputs = torch.randn(4, 3, 3, 3, generator=generator)[labels] + 0.5 * torch.randn(200, 3, 3, 3, generator=generator)
    return Task("t", nn.Identity(), train=Arrays(inputs, labels), test=Arrays(inputs, labels))


@pytest.mark.parametrize("kind", ["full", "lora", "l_lora", "l_lora_whole"])
def test_an_expert_is_a_network_that_knows_its_task_and_can_be_merged(kind):
    backbone, told = network(), []
    before = eu.state_dict(backbone)
    expert = eu.tune(backbone, task(), kind=kind, steps=80, lr=0.05, rank=4, progress=lambda *step: told.append(step))
    assert told[-1] == ("t", 80, 80)
    assert task().score(expert).value > task().score(backbone).value + 0.2
    assert isinstance(expert, Tangent) is (kind == "l_lora_whole")
    assert not expert.training
    assert all(p.requires_grad for p in expert.parameters())
    for name, tensor in eu.state_dict(backbone).items():
        assert torch.equal(tensor, before[name])
    merged = eu.merge("task_arithmetic", backbone, [expert], scale=1.0)
    assert list(merged.specs) == list(before)
    again = network()
    again.network.load_state_dict(eu.state_dict(merged))
    again = tangent_at(again, before) if kind == "l_lora_whole" else again
    inputs = task().arrays("test").inputs
    torch.testing.assert_close(again.eval()(inputs), expert(inputs), rtol=1e-4, atol=1e-4)


def test_adapters_are_called_as_the_state_dict_calls_their_layers():
    model = network()
    attach(model, 2, 4, seed=0)
    assert [name for name, _ in adapters(model)] == ["1", "3"]


def test_what_cannot_be_learned_is_said():
    with pytest.raises(TaskError, match="no split 'train'"):
        eu.tune(network(), Task("t", nn.Identity(), test=task().arrays("test")))
    with pytest.raises(NonFiniteError, match="step "):
        eu.tune(network(), task(), kind="full", steps=20, lr=1e30)
