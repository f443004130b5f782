"""Generalisation and robustness on a small cut of the packaged suite: three of its tasks, few samples."""

from collections import defaultdict

import pytest
import torch
from tests.bench.cuts import cut

from eutectic.bench import evaluate, report, zoo
from eutectic.bench.corruptions import corrupt, corrupted
from eutectic.bench.evaluate import Choice, merge_suite
from eutectic.bench.protocols import Parting, generalisation, partings, robustness
from eutectic.bench.suite import Suite
from eutectic.errors import EutecticError, LayoutError, ParameterError, TaskError, UnknownNameError
from eutectic.fusion._api import fit, fused
from eutectic.fusion._folder import filled
from eutectic.task import Task

TASKS = ("mnist", "letters", "digits8")
SIZES = {"train": 8, "val": 16, "adapt": 16, "test": 24}
QUICK = {"steps": 1, "batch_size": 4}
PARTED = [Parting(("mnist", "digits8"), ("letters",))]


class Blind(Suite):
    """Of ``letters`` it has nothing but the test set."""

    def task(self, name):
        whole = super().task(name)
        return Task(name, whole.head, test=whole.arrays("test")) if name == "letters" else whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cut(tmp_path_factory.mktemp("cut"), TASKS, SIZES)


@pytest.fixture(scope="module")
def suite(folder):
    return Suite(folder)


@pytest.fixture(scope="module")
def general(folder):
    """Of a suite that has no inputs of the unseen task to adapt to, or to choose on."""
    return list(generalisation(Blind(folder), [Choice("task_arithmetic"), Choice("adamerging", QUICK)], PARTED))


def by_method(records):
    found = defaultdict(dict)
    for one in records:
        found[one.method.partition("(")[0]][one.task] = one
    return found


def test_six_of_eight_tasks_are_seen_and_two_are_not_twice():
    first, second = partings(zoo.open_suite("mini"))
    for seen, unseen in (first, second):
        assert (len(seen), len(unseen)) == (6, 2)
        assert {*seen, *unseen} == {*zoo.open_suite("mini").classes}
    assert first.unseen == ("digits8", "openclipart")
    assert second.unseen == ("mnist", "fashion")


def test_adaptation_sees_no_unseen_task(general, folder):
    for name in ("task_arithmetic", "adamerging"):
        for one in by_method(general)[name].values():
            assert list(one.inputs) == ["base", "mnist", "digits8"]
            assert "unseen letters" in one.protocol
    for name, split in (("task_arithmetic", "val"), ("adamerging", "adapt")):  # such a look would have been noticed
        with pytest.raises(TaskError, match=f"'letters' has no split '{split}'"):
            list(
                generalisation(
                    Blind(folder), [Choice(name, QUICK if split == "adapt" else {})], [Parting(("letters",), ("mnist",))]
                )
            )


def test_means_are_those_of_the_tasks(general):
    for row in by_method(general).values():
        assert list(row) == ["mnist", "digits8", "letters", "mean of seen", "mean of unseen", "mean"]
        values = {name: one.value for name, one in row.items()}
        assert values["mean of seen"] == pytest.approx((values["mnist"] + values["digits8"]) / 2)
        assert values["mean of unseen"] == values["letters"]
        assert values["mean"] == pytest.approx(sum(values[task] for task in TASKS) / 3)
        roles = [one.notes.split(";")[0] for name, one in row.items() if name != "mean"]
        assert roles == ["seen", "seen", "unseen", "seen", "unseen"]
    assert list(by_method(general)) == ["pretrained", "individual", "task_arithmetic", "adamerging"]
    assert "mean of unseen" in report.markdown(general)


def test_a_generalisation_scores_what_the_seen_experts_make(general, suite):
    one = by_method(general)["task_arithmetic"]["letters"]
    assert "chosen on val among 5" in one.notes
    network = suite.backbone()
    filled(network, merge_suite(suite, "task_arithmetic", one.parameters, ["mnist", "digits8"]))
    assert suite.task("letters").score(network).value == one.value
    filled(network, suite.base)
    assert suite.task("letters").score(network).value == by_method(general)["pretrained"]["letters"].value


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_robustness_fits_clean_once_and_each_corruption_alike(suite, monkeypatch):
    fitted = []

    def spied(name, models, tasks, parameters, run):
        fitted.append(({task.name: task.arrays("adapt").inputs for task in tasks}, fit(name, models, tasks, parameters, run)))
        return fitted[-1][1]

    monkeypatch.setattr(evaluate, "fit", spied)
    tasks = ["mnist", "digits8"]
    methods = ["average", "adamerging"]
    choices = [Choice("average"), Choice("adamerging", QUICK | {"lr": 0.3, "steps": 2})]
    records = list(robustness(suite, choices, ["contrast"], [3], tasks, seed=4))
    assert len(fitted) == 2
    for task in tasks:
        clean = suite.task(task).arrays("adapt").inputs
        assert torch.equal(fitted[0][0][task], clean)
        assert torch.equal(fitted[1][0][task], corrupt(clean, "contrast", 3))  # which draws nothing at random

    sets = ["test", "test, contrast 3"]
    rows = defaultdict(list)
    for one in records:
        assert one.seed == 4
        rows[one.method.partition("(")[0], "corrupted inputs" in one.protocol, one.split].append(one)
    expected = [(method, False, split) for method in ("pretrained", "individual", *methods) for split in sets]
    assert list(rows) == [*expected, ("adamerging", True, sets[1])]
    for found in rows.values():
        assert [one.task for one in found] == [*tasks, "mean"]
        assert found[2].value == pytest.approx((found[0].value + found[1].value) / 2)
    assert all(bool(one.recipe_sha256) == ("corrupted inputs" not in one.protocol) for one in records if one.parameters)

    network = suite.backbone()
    for at, split, adapted in ((0, sets[0], False), (0, sets[1], False), (1, sets[1], True)):
        filled(network, fused(suite.base, suite.experts(tasks), fitted[at][1]))
        for one, task in zip(rows["adamerging", adapted, split], tasks, strict=False):
            given = suite.task(task)
            scored = given if split == "test" else corrupted(given, "contrast", 3)
            assert one.value == scored.score(network).value
    with pytest.raises(EutecticError, match="one split"):
        report.grids(records)


def test_what_cannot_be_done_is_refused_before_anything_is_scored(suite):
    def first(records):
        said = []
        with pytest.raises((LayoutError, ParameterError, TaskError, UnknownNameError)) as caught:
            next(records(said.append))
        assert said == []
        return str(caught.value)

    assert "Did you mean 'adamerging'" in first(
        lambda told: generalisation(suite, [Choice("adamergin")], PARTED, progress=told)
    )
    assert "slerp" in first(lambda told: robustness(suite, [Choice("slerp")], ["jpeg"], [1], progress=told))
    assert "step" in first(lambda told: robustness(suite, [Choice("adamerging", {"stepps": 1})], ["jpeg"], [1], progress=told))
    assert "severity = 9" in first(lambda told: robustness(suite, [], ["jpeg"], [1, 9], progress=told))
    both = [Parting(("mnist", "letters"), ("letters",))]
    assert "letters: cannot be both" in first(lambda told: generalisation(suite, [], both, progress=told))
    assert "at least one" in first(lambda told: generalisation(suite, [], [Parting(("mnist",), ())], progress=told))
    assert "at least 4" in first(lambda told: generalisation(suite, [], progress=told))
