"""Several experts of one task: averaged, or their modules switched."""

import itertools

import pytest
import torch
from torch import nn

from eutectic.checkpoint.base import Memory
from eutectic.errors import ParameterError
from eutectic.fusion._api import fit, fused
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.merge.view import Merged
from eutectic.security.defences.module_switching import fitness, modules_of, switched

LAYERS, KINDS = 4, ("query", "key", "mlp")


def weights(seed):
    random = torch.Generator().manual_seed(seed)
    names = [f"layer.{i}.{kind}.{part}" for i in range(LAYERS) for kind in KINDS for part in ("weight", "bias")]
    shapes = {name: (3, 2) if name.endswith("weight") else (3,) for name in [*names]} | {
        "layer.0.norm.weight": (3,),
        "stem": (2, 2),
    }
    return Memory({name: torch.randn(shape, generator=random) for name, shape in shapes.items()})


BASE = weights(0)
EXPERTS = {name: weights(1 + i) for i, name in enumerate(["bad", "good", "other"])}


def made(name, experts, parameters):
    artefact = fit(name, ModelSet(nn.Module(), BASE, experts), [], parameters, Run())
    return fused(BASE, experts, artefact)


def same(left, right):
    return all(torch.allclose(left.read(name), right.read(name), atol=1e-6) for name in left.specs)


@pytest.mark.parametrize("name", ["wag", "module_switching"])
def test_one_expert_or_equal_ones_are_what_they_are(name):
    assert same(made(name, {"a": EXPERTS["bad"]}, {}), EXPERTS["bad"])
    assert same(made(name, {"a": EXPERTS["bad"], "b": EXPERTS["bad"]}, {}), EXPERTS["bad"])


def test_wag_averages_each_group_and_merges_what_comes_of_them():
    assert same(made("wag", EXPERTS, {}), Merged("average", None, EXPERTS))
    some = {"both": Merged("average", None, {k: EXPERTS[k] for k in ("bad", "good")}), "other": EXPERTS["other"]}
    found = made("wag", EXPERTS, {"groups": {"both": ["bad", "good"]}, "parameters": {"scale": 0.4}})
    assert same(found, Merged("task_arithmetic", BASE, some, {"scale": 0.4}))


def test_a_backdoor_of_one_of_n_is_diluted_n_times_by_wag():
    theta = BASE.read("stem")
    for n in (2, 4):
        experts = {str(i): BASE for i in range(n - 1)} | {"bad": EXPERTS["bad"]}
        moved = made("wag", experts, {}).read("stem") - theta
        assert torch.allclose(moved * n, EXPERTS["bad"].read("stem") - theta, atol=1e-5)


def test_switched_modules_are_whole_and_neighbours_differ():
    pair = {name: EXPERTS[name] for name in ("bad", "good")}
    found, modules = made("module_switching", pair, {}), modules_of(BASE)
    assert [module.layer for module in modules] == [i for i in range(LAYERS) for _ in KINDS]
    sources = []
    for module in modules:
        whose = [all(torch.equal(found.read(t), e.read(t)) for t in module.tensors) for e in pair.values()]
        assert whose.count(True) == 1
        sources.append(whose.index(True))
    assert sources.count(0) == sources.count(1)
    assert sum(a == b for a, b in itertools.pairwise(sources)) < len(sources) / 2
    mean = Merged("average", None, pair)
    for rest in ("stem", "layer.0.norm.weight"):
        assert torch.allclose(found.read(rest), mean.read(rest))


def test_the_search_is_seeded_and_never_ends_below_where_it_began():
    modules = modules_of(BASE)
    for experts in (2, 3):
        start = switched(modules, experts, 0, 0)
        found = switched(modules, experts, 300, 0)
        assert fitness(modules, found, experts) >= fitness(modules, start, experts)
        assert found == switched(modules, experts, 300, 0)
        # all of one expert, what a backdoor would need, is the worst there is
        assert fitness(modules, [0] * len(modules), experts) < fitness(modules, start, experts)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"a": ["badd"]}, "no expert 'badd'. Did you mean 'bad'"),
        ({"a": ["bad"], "b": ["bad", "good"]}, "'bad' is in 'a' and in 'b'"),
        ({"a": []}, "'a' is empty"),
        ({"other": ["bad", "good"]}, "'other' is also an expert"),
    ],
)
@pytest.mark.parametrize("name", ["wag", "module_switching"])
def test_groups_that_make_no_sense_are_refused(name, groups, says):
    with pytest.raises(ParameterError, match=says):
        made(name, EXPERTS, {"groups": groups})
