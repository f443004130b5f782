"""Units in another order: the same function, found again, and merged where they could not be."""

import pytest
import torch
from tests.ensemble.parties import digits
from torch import nn

import eutectic as eu
from eutectic import errors
from eutectic.bench import zoo
from eutectic.checkpoint.base import Memory, live
from eutectic.ensemble._networks import CNN, MLP
from eutectic.merge.permutations import (
    DINOV2,
    aligned,
    groups_by_pattern,
    groups_of_sequential,
    match,
    permuted,
)
from eutectic.task import Arrays
from eutectic.tuning.trainer import Training, fine_tune


def network(kind, seed=0):
    torch.manual_seed(seed)
    described = MLP(widths=(24, 16)) if kind == "mlp" else CNN(channels=(6, 8), hidden=12, dropout=0.0)
    made = described.build((1, 8, 8), 10).eval()
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return made


def at_random(groups, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(group.units, generator=generator) for name, group in groups.items()}


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_permuted_network_computes_the_same_and_matching_finds_the_permutation(kind):
    pytest.importorskip("scipy")
    one = network(kind)
    groups = groups_of_sequential(one)
    assert [group.units for group in groups.values()] == ([24, 16] if kind == "mlp" else [6, 8, 12])
    state, known = one.state_dict(), at_random(groups)
    moved, x = permuted(state, groups, known), torch.rand(5, 1, 8, 8)
    before = one(x)
    other = network(kind, seed=9)
    other.load_state_dict(moved)
    torch.testing.assert_close(other(x), before, atol=1e-5, rtol=1e-5)
    assert not torch.equal(moved["1.weight" if kind == "mlp" else "0.weight"], next(iter(state.values())))
    found = match(state, moved, groups)
    assert all(torch.equal(known[name][order], torch.arange(len(order))) for name, order in found.items())
    again = permuted(moved, groups, found)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_a_transformer_by_pattern():
    pytest.importorskip("scipy")
    suite = zoo.open_suite("mini")
    base = eu.state_dict(suite.base)
    layout = suite.base.specs
    groups = groups_by_pattern(DINOV2, layout, {"heads": 6})
    assert {name.split(".")[0] for name in groups} == {"mlp", "heads"}
    moved = permuted(base, groups, at_random(groups))
    images, _ = suite.task("mnist").arrays("test").take(torch.arange(4))
    with torch.no_grad():
        torch.testing.assert_close(suite.backbone(Memory(moved))(images), suite.backbone()(images), atol=1e-4, rtol=1e-4)
    again = aligned(suite.base, Memory(moved), groups)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in base.items())


def test_two_networks_without_a_common_base_can_be_merged_once_they_are_aligned():
    pytest.importorskip("scipy")
    images, labels = digits("train")
    test, truth = digits("test")
    models = [MLP(widths=(256,)).build((1, 8, 8), 10) for _ in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        fine_tune(model, nn.Identity(), Arrays(images, labels), Training(steps=150, lr=1e-2, batch_size=64, seed=seed))
    groups = groups_of_sequential(models[0])
    target, other = (live(model) for model in models)

    def accuracy(checkpoint):
        made = MLP(widths=(256,)).build((1, 8, 8), 10).eval()
        made.load_state_dict(eu.state_dict(checkpoint))
        return (made(test).argmax(1) == truth).float().mean().item()

    apart = accuracy(eu.merge("average", None, [target, other]))
    together = accuracy(eu.merge("average", None, [target, aligned(target, other, groups)]))
    ends = min(accuracy(target), accuracy(other))
    assert accuracy(aligned(target, other, groups)) == pytest.approx(accuracy(other), abs=0.005)
    assert together > ends - 0.03
    assert ends - together < ends - apart


def test_the_distance_never_grows_and_the_seed_only_orders():
    pytest.importorskip("scipy")
    one, two = network("mlp", 0).state_dict(), network("mlp", 1).state_dict()
    groups = groups_of_sequential(network("mlp"))

    def distance(tensors):
        return sum((one[name] - tensors[name]).square().sum() for name in one)

    for seed in range(3):
        assert distance(permuted(two, groups, match(one, two, groups, seed=seed))) < distance(two)
    first, again = match(one, two, groups), match(one, two, groups)
    assert all(torch.equal(first[name], again[name]) for name in groups)


def test_what_cannot_be_permuted_is_refused():
    layout = live(network("mlp")).specs
    for patterns, says in (
        ({"a": ["9.weight:0"]}, "no tensor is called '9.weight'"),
        ({"a": ["1.weight:0", "8.bias:0"]}, "no axis 0 of a tensor '8.bias'"),
        ({"a": ["1.weight:0", "3.bias:0"]}, "has 24 entries for 16 units"),
    ):
        with pytest.raises(errors.LayoutError, match=says):
            groups_by_pattern(patterns, layout)
    with pytest.raises(errors.LayoutError, match="of a GRU it is not known"):
        groups_of_sequential(nn.Sequential(nn.GRU(2, 2)))
    with pytest.raises(errors.LayoutError, match="a convolution in groups"):
        groups_of_sequential(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)))


def test_weights_that_are_no_numbers_are_refused():
    pytest.importorskip("scipy")
    one = network("mlp").state_dict()
    groups = groups_of_sequential(network("mlp"))
    broken = {**one, "1.weight": one["1.weight"] / 0}
    with pytest.raises(errors.NonFiniteError, match="the other's '1.weight'"):
        match(one, broken, groups)
