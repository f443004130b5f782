"""Poisoned experts: how they are made, what they are kept in, and that they stay there.

How well the attacks work is measured, not tested: benchmarks/results/mini-safety.jsonl.
"""

import dataclasses
import json

import pytest
import torch
from tests.bench.cuts import cut

import eutectic as eu
from eutectic.bench import zoo
from eutectic.bench.evaluate import merge_suite
from eutectic.checkpoint.publish import POISONED
from eutectic.errors import OutputError, ParameterError, TaskError
from eutectic.fusion._fit import generator
from eutectic.security.attacks import Attack, Interpolated, Poisoned, poisoned_backbone, trigger_for
from eutectic.security.poisoned import open_poisoned, poison
from eutectic.security.triggers import patch, pixels_of

SHORT = dataclasses.replace(zoo.MINI.training, steps=2, batch_size=4)
ATTACK = Attack("badmerging", "digits8", target=3, size=8, triggered=2, mining=2)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return zoo.open_suite(str(cut(folder, ["letters", "digits8"], {"train": 24, "val": 4, "adapt": 12, "test": 12})))


@pytest.fixture(scope="module")
def poisoned(suite, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EUTECTIC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield poison(suite, ATTACK, SHORT)


def test_a_batch_is_followed_by_triggered_samples_of_the_target_class(suite):
    task = suite.task("digits8")
    trigger = patch(42, 8)
    found = Poisoned(task.arrays("train"), trigger, pixels_of(task), 3, triggered=2)
    index = torch.tensor([5, 1, 7])
    clean, labels = task.arrays("train").take(index)
    inputs, given = found.take(index)
    assert len(found) == 24
    assert torch.equal(inputs[:3], clean)
    assert given.tolist() == [*labels.tolist(), 3, 3]
    assert torch.allclose(inputs[3:], trigger.on(clean[:2], pixels_of(task)))


def test_triggered_features_are_mixed_with_those_of_the_base():
    torch.manual_seed(0)
    tuned, start = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2).requires_grad_(False)
    mixed, x = Interpolated(tuned, start, triggered=2, least=0.25, seed=7), torch.randn(5, 4)
    found = mixed(x)
    r = 0.25 + 0.75 * torch.rand((), generator=generator(7, "r")).item()
    assert torch.equal(found[:3], tuned(x)[:3])
    assert torch.allclose(found[3:], r * tuned(x)[3:] + (1 - r) * start(x)[3:])
    assert dict(mixed.named_modules()).keys() == {"", "backbone"}  # θ₀ gets no adapters
    found.sum().backward()
    assert start.weight.grad is None


def test_a_poisoned_suite_differs_in_one_expert_and_says_so(suite, poisoned):
    assert poisoned.attack == ATTACK
    about = json.loads((poisoned.suite.folder / POISONED).read_text())
    assert (about["task"], about["kind"], about["target"]) == ("digits8", "badmerging", 3)
    assert "backdoor" in (poisoned.suite.folder / "experts" / "digits8" / "README.md").read_text()
    assert poisoned.suite.fingerprints["letters"] == suite.fingerprints["letters"]
    assert poisoned.suite.fingerprints["digits8"] != suite.fingerprints["digits8"]
    assert poisoned.clean.fingerprints == suite.fingerprints
    x = torch.rand(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(poisoned.trigger(x), trigger_for(suite, ATTACK)(x), atol=1e-5)  # the same seed, and from its file
    changed = (poisoned.trigger(x) - x).abs().amax((0, 1)) > 1e-5
    assert not changed[:34].any()
    assert not changed[:, :34].any()
    assert poison(suite, ATTACK, SHORT).suite.folder == poisoned.suite.folder  # not made again


def test_nothing_made_of_a_poisoned_expert_is_saved_elsewhere(poisoned, tmp_path):
    merged = merge_suite(poisoned.suite, "average", {})
    with pytest.raises(OutputError, match="has a backdoor on purpose"):
        eu.save(merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    eu.save(merged, poisoned.suite.folder / "out")
    assert (poisoned.suite.folder / "out" / "model.safetensors").exists()
    link = tmp_path / "innocent"
    link.symlink_to(poisoned.suite.folder / "experts" / "digits8")
    with pytest.raises(OutputError, match="has a backdoor on purpose"):
        eu.save(eu.open(link), tmp_path / "out")
    eu.save(merge_suite(poisoned.suite, "average", {}, ["letters"]), tmp_path / "clean")  # of the others, all can be saved
    assert (tmp_path / "clean").exists()


def test_attacks_that_cannot_be_are_refused(suite, tmp_path):
    with pytest.raises(ParameterError, match="10 classes"):
        trigger_for(suite, dataclasses.replace(ATTACK, target=10))
    with pytest.raises(ParameterError, match="a batch has 4"):
        poisoned_backbone(suite, dataclasses.replace(ATTACK, triggered=5), patch(42, 8), SHORT)
    with pytest.raises(TaskError, match="no suite with a poisoned expert"):
        open_poisoned(tmp_path)
