"""Fronts of preferences on a small cut of the packaged suite: two of its tasks, few samples."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
from tests.bench.cuts import cut

from eutectic.bench import fronts
from eutectic.bench.evaluate import Choice
from eutectic.bench.fronts import AT, figure, grid, hypervolume, pareto, plot
from eutectic.bench.suite import Suite
from eutectic.checkpoint.base import Memory
from eutectic.errors import EutecticError, TaskError, UnknownNameError
from eutectic.merge.api import state_dict

pytest.importorskip("moocore")

TASKS = ("letters", "digits8")
SIZES = {"train": 8, "val": 8, "adapt": 8, "test": 20}
QUICK = {"steps": 1, "batch_size": 2}


class Held(Suite):
    """Its experts are in memory: adapters would be expanded at each of many reads."""

    @functools.cache  # noqa: B019
    def expert(self, task):
        return Memory(state_dict(super().expert(task)))


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return Held(cut(tmp_path_factory.mktemp("cut"), TASKS, SIZES))


@pytest.fixture(scope="module")
def records(suite):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fronts, "SCALES", (0.8, 1.0))
        return list(pareto(suite, [Choice("pwe_moe", QUICK)], TASKS, parts=2))


def test_every_point_is_scored_with_its_preference_and_every_front_is_measured(records):
    fronted = {}
    for one in records:
        name, at, _ = one.method.partition(AT)
        if at and one.task == "mean":
            fronted.setdefault(name, []).append(one.parameters["preference"])
    ends = [[1, 0], [0, 1], [0.5, 0.5]]
    assert fronted == {
        "pwe_moe(steps=1, batch_size=2)": [[1, 0], [0.5, 0.5], [0, 1]],
        "task_arithmetic": [[1, 0], [0.5, 0.5], [0, 1]],
        "linear, one by one": ends,
        "mgda, one by one": ends,
    }
    volumes = {one.method: one for one in records if one.metric == "hypervolume"}
    assert list(volumes) == list(fronted)
    assert [one.method for one in records if one.metric == "spread"] == list(fronted)
    for name, whole in volumes.items():
        points = [
            [one.value for one in records if one.method == said and one.task in TASKS]
            for said in dict.fromkeys(one.method for one in records if one.method.startswith(name + AT))
        ]
        assert whole.value == pytest.approx(staircase(points))
        assert whole.low <= whole.value <= whole.high
        assert whole.task == "letters, digits8"
        assert "3 points, reference point 0" in whole.notes
    for line in records:
        json.loads(line.to_json())


def test_corners_are_the_experts_where_nothing_is_left_to_learn_there(records):
    own = {one.task: one.value for one in records if one.method == "individual"}
    for task, said in zip(TASKS, ("1 : 0", "0 : 1"), strict=True):
        for name in ("pwe_moe(steps=1, batch_size=2)", "linear, one by one", "mgda, one by one"):
            (found,) = [one for one in records if one.method == f"{name}{AT}{said}" and one.task == task]
            assert found.value == pytest.approx(own[task], abs=0.051)  # one of twenty


def test_the_scale_of_interpolation_is_chosen_on_val_and_the_fit_tells_its_losses(records):
    (first, *_) = [one for one in records if one.method.startswith("task_arithmetic at")]
    assert first.parameters["scale"] in (0.8, 1.0)
    assert "chosen on val among 2 candidates, by hypervolume" in first.notes
    assert any(one.notes.startswith("held-out loss by step") for one in records)


def staircase(points):
    """The area below points of two coordinates."""
    area, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):
        area, height = area + x * max(0.0, y - height), max(height, y)
    return area


def test_hypervolumes():
    assert hypervolume([[0.5, 0.25]]) == pytest.approx(0.125)
    assert hypervolume([[0.5, 0.5, 0.5], [1.0, 0.2, 0.2]]) == pytest.approx(0.125 + 0.04 - 0.02)
    assert hypervolume([[1.0] * 8, [0.5] * 8]) == pytest.approx(1)
    points = np.random.default_rng(0).random((30, 2))
    assert hypervolume(points) == pytest.approx(staircase(points.tolist()))
    assert hypervolume(points[::-1]) == pytest.approx(hypervolume(points))
    assert hypervolume(np.vstack([points, points.min(0)])) == pytest.approx(hypervolume(points))
    cube = np.random.default_rng(1).random((12, 3))
    inside = (np.random.default_rng(2).random((40000, 1, 3)) < cube).all(2).any(1).mean()
    assert hypervolume(cube) == pytest.approx(inside, abs=0.01)


@pytest.mark.parametrize(("k", "parts", "n"), [(2, None, 11), (3, None, 22), (8, None, 9), (2, 5, 7), (2, 4, 5)])
def test_a_grid_has_the_corners_and_the_centre(k, parts, n):
    points = grid(k, parts)
    assert len(points) == n == len(set(points))
    assert points == sorted(points, reverse=True)
    assert tuple([1 / k] * k) in points
    for corner in np.eye(k):
        assert tuple(corner) in points
    assert all(math.isclose(sum(p), 1) for p in points)


def test_what_has_no_front_is_refused(suite):
    for tasks in ((), ("letters",), ("letters", "letters")):
        with pytest.raises(TaskError, match="two tasks or more"):
            next(pareto(suite, [Choice("pwe_moe")], tasks))
    for method in ("ties", "adamerging"):
        with pytest.raises(EutecticError, match=f"{method} takes no preference"):
            next(pareto(suite, [Choice(method)], TASKS))
    with pytest.raises(UnknownNameError, match="no task 'leters'"):
        next(pareto(suite, [Choice("pwe_moe")], ("leters", "digits8")))


def test_two_and_three_tasks_are_drawn(records, tmp_path):
    pytest.importorskip("matplotlib")
    plot(records, tmp_path / "two.svg", figure())
    first = (tmp_path / "two.svg").read_text()
    plot(records, tmp_path / "two.svg", figure())
    assert (tmp_path / "two.svg").read_text() == first
    assert "letters, %" in first
    assert "linear, one by one" in first
    more = [dataclasses.replace(one, task="third") for one in records if one.task == "letters"]
    plot([*records, *more], tmp_path / "three.svg", figure())
    assert (tmp_path / "three.svg").read_text().count("third, %") == 2
    with pytest.raises(EutecticError, match="two or three tasks are drawn, not of 1"):
        plot(more, tmp_path / "one.svg", figure())
