"""Editing by task vectors: forgetting, and analogies, by the recipes in examples/edit."""

from pathlib import Path

import pytest
import torch

import eutectic as eu
from eutectic.bench import zoo
from eutectic.bench.evaluate import suite_recipe
from eutectic.checkpoint.base import Memory
from eutectic.fusion._folder import filled
from eutectic.merge.recipe import load

EDITS = Path(__file__).parent.parent.parent / "examples" / "edit"


@pytest.fixture(scope="module")
def mini():
    return zoo.open_suite("mini")


def test_an_analogy_is_one_expert_with_the_difference_of_two_others(mini):
    merged = eu.state_dict(suite_recipe(load(EDITS / "analogy.yaml")))
    a, b, c = (eu.state_dict(mini.expert(name)) for name in ("fashion", "mnist", "letters"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, c[name] + (b[name] - a[name]), atol=1e-5, rtol=1e-5)


def test_negating_what_was_added_gives_the_base_back(mini):
    base, expert = mini.base, mini.expert("letters")
    added = Memory(eu.state_dict(eu.merge("task_arithmetic", base, [expert], scale=0.7)))
    back = eu.merge("task_arithmetic", added, [Memory(_sum(added, expert, base))], scale=-0.7)
    for name, tensor in eu.state_dict(base).items():
        torch.testing.assert_close(back.read(name), tensor, atol=1e-5, rtol=1e-4)


def _sum(start, expert, base):
    """θ + τ: a model whose task vector over ``start`` is the expert's over the base."""
    return {name: start.read(name) + expert.read(name) - base.read(name) for name in base.specs}


@pytest.mark.slow
def test_negating_a_task_forgets_it_and_keeps_what_is_unlike_it(mini):
    recipe = load(EDITS / "negate.yaml")
    network = mini.backbone()
    tasks = {name: mini.task(name) for name in ("animals", "mnist", "fashion")}
    before = {name: task.score(network).value for name, task in tasks.items()}
    filled(network, suite_recipe(recipe))
    lost = {name: before[name] - task.score(network).value for name, task in tasks.items()}
    assert lost["animals"] > 0.03
    assert max(lost["mnist"], lost["fashion"]) < 0.015
