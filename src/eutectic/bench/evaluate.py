"""Score networks on tasks, and fuse-and-score whole suites: the numbers of the demo, the benchmark and `eutectic eval`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from eutectic import record, registry
from eutectic.bench.backbones import fill
from eutectic.bench.suite import Suite
from eutectic.bench.zoo import open_suite
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Lerp
from eutectic.errors import LayoutError, RecipeError, TaskError
from eutectic.merge.api import state_dict
from eutectic.merge.recipe import Recipe
from eutectic.merge.run import bind
from eutectic.merge.view import Merged
from eutectic.record import Record
from eutectic.task import Task

Progress = Callable[[str], None]
#: what the demo shows: the families' own, and those that have passed them
REPRESENTATIVE = ("average", "task_arithmetic", "ties", "sce", "magmax", "consensus", "tsv_m", "iso_c", "wudi", "lines")


def evaluate(
    model: nn.Module, tasks: Sequence[Task], *, split: str = "test", batch_size: int = 256, **fields: Any
) -> list[Record]:
    """Score one backbone on each task: a list of records, one a task, in order.

    ``fields`` are further fields of the records (``suite``, ``method``, ``seed``, ``recipe_sha256`` …).
    Raises TaskError if there is no task, or one cannot be scored.
    """
    if not tasks:
        raise TaskError("evaluate: no tasks were given")
    found = []
    for task in tasks:
        started = time.perf_counter()
        score = task.score(model, split, batch_size)
        about: dict[str, Any] = {"suite": "", "method": type(model).__name__} | fields
        found.append(
            Record(
                **about,
                task=task.name,
                metric="accuracy",
                value=score.value,
                low=score.low,
                high=score.high,
                n=score.n,
                split=split,
                wall_s=time.perf_counter() - started,
                peak_rss_bytes=record.peak_rss_bytes(),
                versions=record.versions(),
            )
        )
    return found


def run_suite(suite: Suite, methods: Sequence[str], *, progress: Progress = lambda line: None) -> Iterator[Record]:
    """θ₀, the experts one by one, and every method on a suite's test sets; ends each with a ``mean`` record.

    A method's ``GRID`` is searched on the tasks' ``val`` splits (labelled training images that no expert saw), never on
    ``test``; ties go to the first candidate.
    """
    for method in methods:
        merge_suite(suite, method, {})  # what cannot be merged is refused before an hour of scoring
    network = suite.backbone()
    common = {"suite": suite.name, "seed": 0, "protocol": "inductive"}
    progress("pretrained")
    record.reset_peak_rss()
    base = {"base": suite.fingerprints["base"]}
    yield from _with_mean(evaluate(network, suite.tasks, method="pretrained", inputs=base, **common))
    individual = []
    for task in suite.tasks:
        progress(f"individual: {task.name}")
        fill(network, suite.expert(task.name))
        inputs = {task.name: suite.fingerprints[task.name]}
        individual += evaluate(network, [task], method="individual", inputs=inputs, **common)
    yield from _with_mean(individual)
    for method in methods:
        record.reset_peak_rss()
        yield from run_method(suite, network, method, progress, common | {"inputs": suite.fingerprints})


def run_method(
    suite: Suite, network: nn.Module, method: str, progress: Progress, common: Mapping[str, Any]
) -> Iterator[Record]:
    """Choose a method's scalars on ``val``, score it on ``test``; wall times cover choosing and merging too."""
    started = time.perf_counter()
    candidates = list(grid(method))
    chosen, notes = candidates[0], ""
    if len(candidates) > 1:
        scores = []
        for number, merged in enumerate(_candidates(suite, method, candidates), start=1):
            progress(f"{method}: choosing on val, {number} of {len(candidates)}")
            fill(network, merged)
            scores.append(sum(task.score(network, "val").value for task in suite.tasks) / len(suite.tasks))
        chosen = candidates[max(range(len(candidates)), key=scores.__getitem__)]
        notes = f"{chosen} chosen on val among {len(candidates)} candidates"
    progress(f"{method}: scoring")
    merged = merge_suite(suite, method, chosen)
    fill(network, merged)
    recipe = Recipe(method=method, suite=suite.name, parameters=merged.parameters)
    fitted_s = time.perf_counter() - started
    records = evaluate(
        network, suite.tasks, method=method, parameters=merged.parameters, recipe_sha256=recipe.sha256(), notes=notes, **common
    )
    *parts, mean = _with_mean(records)
    yield from parts
    yield dataclasses.replace(mean, wall_s=mean.wall_s + fitted_s)


def choose(
    suite: Suite,
    network: nn.Module,
    method: str,
    tasks: Sequence[Task],
    given: Mapping[str, Any],
    progress: Progress = lambda line: None,
) -> tuple[Merged, str]:
    """The merge of the experts of some tasks that does best on their ``val``, and a note that says so.

    What is ``given`` is kept; what else the method's ``GRID`` proposes is searched.  Ties go to the first candidate.
    """
    experts = [task.name for task in tasks]
    candidates: list[dict[str, Any]] = []
    for proposed in grid(method):
        candidate = {name: value for name, value in proposed.items() if name not in given}
        if candidate not in candidates:
            candidates.append(candidate)
    chosen, notes = candidates[0], ""
    if len(candidates) > 1:
        scores = []
        for number, merged in enumerate(_candidates(suite, method, candidates, experts, given), start=1):
            progress(f"{method}: choosing on val, {number} of {len(candidates)}")
            fill(network, merged)
            scores.append(sum(task.score(network, "val").value for task in tasks) / len(tasks))
        chosen = candidates[max(range(len(candidates)), key=scores.__getitem__)]
        notes = f"{chosen} chosen on val among {len(candidates)} candidates"
    return merge_suite(suite, method, {**given, **chosen}, experts), notes


def _candidates(
    suite: Suite,
    method: str,
    candidates: Sequence[Mapping[str, Any]],
    experts: list[str] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Iterator[Checkpoint]:
    """The merges to choose among; those that differ in ``scale`` alone, in which every method is linear, share one merge."""
    given = given or {}
    if any(candidate.keys() != {"scale"} for candidate in candidates):
        yield from (merge_suite(suite, method, {**given, **candidate}, experts) for candidate in candidates)
        return
    whole = Memory(state_dict(merge_suite(suite, method, {**given, "scale": 1.0}, experts)))
    yield from (Lerp(suite.base, whole, candidate["scale"]) for candidate in candidates)


def merge_suite(suite: Suite, method: str, parameters: Mapping[str, Any], experts: list[str] | None = None) -> Merged:
    """A suite's experts merged by one method, lazily."""
    return Merged(method, suite.base, suite.experts(experts), parameters)


def grid(method: str) -> Iterator[dict[str, Any]]:
    """The candidates that a method's file proposes in ``GRID``; just the defaults if it proposes none."""
    axes: Mapping[str, Sequence[Any]] = getattr(registry.module("methods", method), "GRID", {})
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def suite_recipe(recipe: Recipe) -> Merged:
    """What a recipe over a suite amounts to; its experts, if any are named, choose among the suite's.

    Raises RecipeError if it names a base, or experts by path.
    """
    suite = open_suite(str(recipe.suite))
    if recipe.base is not None or any(name not in suite.classes for name in recipe.experts.values()):
        raise RecipeError(
            f"the recipe takes base and experts from the suite {recipe.suite!r}: leave out `base`, and in `experts` list only "
            f"names among {', '.join(suite.classes)}"
        )
    if "experts" not in recipe.model_fields_set:
        return bind(recipe, suite.base, suite.experts())
    if len(set(recipe.experts.values())) < len(recipe.experts):
        raise RecipeError(f"`experts` names one of the suite's twice: {', '.join(recipe.experts.values())}")
    listed = list(recipe.experts) == [str(i) for i in range(len(recipe.experts))]
    return bind(recipe, suite.base, {task if listed else name: suite.expert(task) for name, task in recipe.experts.items()})


def fields_of(model: Path) -> dict[str, Any]:
    """The method and recipe of a folder that Eutectic wrote; of another, its name."""
    try:
        about = json.loads((model / "eutectic.json").read_text(encoding="utf-8"))
        recipe = about["recipe"]
        return {
            "method": recipe["method"],
            "recipe_sha256": about["recipe_sha256"],
            "parameters": recipe["parameters"],
            "seed": recipe["seed"],
            "protocol": recipe["protocol"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {"method": model.name}


def applicable(suite: Suite) -> list[str]:
    """The registered methods that take as many experts as the suite has."""
    found = []
    for method in registry.names("methods"):
        try:
            merge_suite(suite, method, {})
        except LayoutError:
            continue
        found.append(method)
    return found


def _with_mean(records: list[Record]) -> list[Record]:
    return [*records, record.mean_of(records)]
