"""Fisher merging against the equation, and its laws."""

import copy

import pytest
import torch
from tests.fusion.whole_tensors import NAMES, average, changed, fitted, models, network, task, tasks, weights
from torch import nn
from torch.func import functional_call, grad, vmap

from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError, NonFiniteError, TaskError
from eutectic.fusion._fit import generator
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._tensors import chosen
from eutectic.fusion.fisher import information


def trainable(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def naive_information(module, of, samples):
    """The equation's two expectations as loops over inputs and parameters; tied weights have one gradient."""
    found = {name: torch.zeros_like(p) for name, p in trainable(module).items()}
    index = chosen(of, samples, Run())
    draws = torch.rand(len(index), generator=generator(0, of.name, "labels"), dtype=torch.float64)
    for place, draw in zip(index.tolist(), draws.tolist(), strict=True):
        copied = copy.deepcopy(module)
        p = of.head(copied(of.splits["adapt"].inputs[place][None]))[0].softmax(0)
        label, below = 0, p[0].item()
        while below < draw:
            label += 1
            below += p[label].item()
        p[label].log().backward()
        for name, parameter in copied.named_parameters():
            if name in found:
                found[name] += parameter.grad**2 / len(index)
    return found


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_fisher_is_the_equation(epsilon):
    given, experts = models()
    result, _ = fitted("fisher", given, tasks(), samples=9, epsilon=epsilon)
    mean = average(experts)
    information_K = []
    for expert, of in zip(experts.values(), tasks(), strict=True):
        module = network()
        module.load_state_dict(expert)
        information_K.append(naive_information(module, of, 9))
    names = list(information_K[0])
    for name, tensor in result.items():
        source = "layer.0.up.weight" if name == "layer.2.up.weight" else name
        if source in names:
            top = sum((f[source] + epsilon) * expert[name] for f, expert in zip(information_K, experts.values(), strict=True))
            expected = top / sum(f[source] + epsilon for f in information_K)
            assert not torch.allclose(expected, mean[name], rtol=1e-3)
        elif tensor.dtype.is_floating_point:
            expected = mean[name]  # buffers, and what is frozen
        else:
            expected = given.base.read(name)
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_information_is_that_of_single_inputs_whatever_batch_they_come_in(batch):
    module, of = network(), task("a")
    index = chosen(of, 12, Run())
    inputs = of.splits["adapt"].inputs[index]
    draws = torch.rand(12, generator=generator(0, "a", "labels"), dtype=torch.float64)
    parameters = {name: p.detach() for name, p in trainable(module).items()}

    def log_p(parameters, x, draw):
        found = of.head(functional_call(module, parameters, (x[None],)))[0].log_softmax(0)
        label = (found.detach().exp().cumsum(0) < draw).sum()
        return found.gather(0, label[None])[0]

    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, draw in zip(inputs.split(batch), draws.split(batch), strict=True):
        for name, gradient in vmap(grad(log_p), in_dims=(None, 0, 0))(parameters, x, draw).items():
            expected[name] += (gradient**2).sum(0) / 12
    found = information(module, trainable(module), of, 12, Run())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-14)


def test_labels_are_drawn_from_the_prediction():
    """Of the logit of a two-class bias the information is p (1 − p)."""
    module = nn.Linear(1, 2, bias=True).double()
    nn.init.zeros_(module.weight)
    module.bias.data = torch.tensor([0.0, -1.5], dtype=torch.float64)
    of = task("a", n=800, shape=(1,), classes=2, width=2)
    of.head = nn.Identity()
    p = module.bias.softmax(0)[1].item()
    found = information(module, dict(module.named_parameters()), of, 800, Run())
    assert found["bias"].tolist() == pytest.approx([p * (1 - p)] * 2, rel=0.15)


def test_an_expert_counts_where_it_is_informed():
    given, experts = models()
    blind = [task("a"), task("b", gain=0.0), task("c", gain=0.0)]
    alone, _ = fitted("fisher", given, blind, samples=6, epsilon=1e-300)
    none, _ = fitted("fisher", given, tasks(gain=0.0), samples=6)
    swamped, _ = fitted("fisher", given, tasks(), samples=6, epsilon=1e12)
    for name in trainable(network()):
        torch.testing.assert_close(alone[name], experts["a"][name], rtol=1e-10, atol=1e-12)
        for tensors in (none, swamped):
            torch.testing.assert_close(tensors[name], average(experts)[name], rtol=1e-8, atol=1e-10)


def test_every_weight_lies_between_the_experts_whatever_their_order():
    given, experts = models()
    result, _ = fitted("fisher", given, tasks(), samples=6)
    backwards, _ = fitted("fisher", given._replace(experts=dict(reversed(given.experts.items()))), tasks(), samples=6)
    for name in trainable(network()):
        stack = torch.stack([expert[name] for expert in experts.values()])
        assert (result[name] >= stack.amin(0) - 1e-12).all()
        assert (result[name] <= stack.amax(0) + 1e-12).all()
        torch.testing.assert_close(result[name], backwards[name])


def test_one_expert_and_equal_experts_stay_as_they_are_to_the_bit():
    given, experts = models()
    for names in (("a",), NAMES):
        same = given._replace(experts={name: Memory(experts["a"]) for name in names})
        result, _ = fitted("fisher", same, tasks(names), samples=3)
        for name in trainable(network()):
            assert torch.equal(result[name], experts["a"][name])


def test_half_precision_checkpoints_keep_their_dtype_and_inputs_stay():
    def half():
        return network(torch.bfloat16)

    def wide():
        return network(torch.float32)

    _, experts = models(half)
    before = {name: {key: tensor.clone() for key, tensor in expert.items()} for name, expert in experts.items()}
    given = ModelSet(wide(), Memory(weights(half())), {name: Memory(expert) for name, expert in experts.items()})
    result, artefact = fitted("fisher", given, tasks(dtype=torch.float32), samples=4)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16, torch.int64}
    assert {artefact.tensors.spec(name).dtype for name in artefact.tensors.specs} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name][key]) for name, e in experts.items() for key, tensor in e.items())
    assert all(torch.isfinite(tensor).all() for tensor in result.values())


def test_what_cannot_be_weighed_is_refused_by_name():
    given, experts = models()
    with pytest.raises(TaskError, match="'c' has no task"):
        fitted("fisher", given, tasks(("a", "b")))
    with pytest.raises(TaskError, match="'d' has no expert"):
        fitted("fisher", given, tasks(("a", "b", "c", "d")))
    broken = changed(network, 2) | {"first.bias": torch.full((8,), float("nan"), dtype=torch.float64)}
    with pytest.raises(NonFiniteError, match="expert 'b'.*gradients"):
        fitted("fisher", given._replace(experts=given.experts | {"b": Memory(broken)}), tasks())
    with pytest.raises(LayoutError, match="requires a gradient"):
        fitted("fisher", given._replace(network=network().requires_grad_(False)), tasks())
    lacking = {name: tensor for name, tensor in experts["a"].items() if name != "last.bias"}
    with pytest.raises(LayoutError, match="last.bias"):
        fitted("fisher", given._replace(base=Memory(lacking)), tasks())
