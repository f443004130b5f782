"""Score networks on tasks, and fuse-and-score whole suites: the numbers of the demo, the benchmark and `eutectic eval`."""

from __future__ import annotations

import dataclasses
import functools
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
from eutectic.fusion._api import fit, fused
from eutectic.fusion._api import method as bound
from eutectic.fusion._fusion import ModelSet, Protocol, Run
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


def run_suite(
    suite: Suite,
    methods: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    protocols: Sequence[Protocol] = ("inductive",),
    progress: Progress = lambda line: None,
) -> Iterator[Record]:
    """θ₀, the experts one by one, and every method on a suite's test sets; ends each with a ``mean`` record.

    A closed-form method's ``GRID`` is searched on the tasks' ``val`` splits (labelled training images that no expert saw),
    never on ``test``; ties go to the first candidate.  Others are fitted with each of the seeds under each protocol.
    """
    for method in methods:  # what cannot be fused is refused before an hour of scoring
        if registry.room_of(method) == "fusion":
            bound(method, {})
        else:
            merge_suite(suite, method, {})
    network = suite.backbone()
    common: dict[str, Any] = {"suite": suite.name, "seed": 0, "protocol": "inductive"}
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
    common["inputs"] = suite.fingerprints
    for method in methods:
        if registry.room_of(method) != "fusion":
            record.reset_peak_rss()
            yield from run_method(suite, network, method, progress, common)
            continue
        for protocol, seed in itertools.product(protocols, seeds):
            record.reset_peak_rss()
            told = functools.partial(_told, progress, f"{method}, {protocol}, seed {seed}")
            run = Run(seed, protocol, progress=told)
            yield from run_fusion(suite, suite.backbone(), method, {}, run, common)


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


def run_fusion(
    suite: Suite, network: nn.Module, method: str, parameters: Mapping[str, Any], run: Run, common: Mapping[str, Any]
) -> Iterator[Record]:
    """Fit a method to a suite's inputs, and score it on ``test``; wall times cover fitting and building too."""
    started = time.perf_counter()
    experts = suite.experts()
    artefact = fit(method, ModelSet(network, suite.base, experts), suite.tasks, parameters, run)
    fill(network, fused(suite.base, experts, artefact))
    chosen = artefact.about["parameters"]
    recipe = Recipe(method=method, suite=suite.name, parameters=chosen, seed=run.seed, protocol=run.protocol)
    fitted_s = time.perf_counter() - started
    about: dict[str, Any] = {"seed": run.seed, "protocol": run.protocol, "parameters": chosen, "recipe_sha256": recipe.sha256()}
    *parts, mean = _with_mean(evaluate(network, suite.tasks, method=method, **{**common, **about}))
    yield from parts
    yield dataclasses.replace(mean, wall_s=mean.wall_s + fitted_s)


def _told(progress: Progress, said: str, what: str, done: int, total: int) -> None:
    if done in (1, total) or done % 20 == 0:
        progress(f"{said}: {what}, {done} of {total}")


def _candidates(suite: Suite, method: str, candidates: Sequence[Mapping[str, Any]]) -> Iterator[Checkpoint]:
    """The merges to choose among; those that differ in ``scale`` alone, in which every method is linear, share one merge."""
    if any(candidate.keys() != {"scale"} for candidate in candidates):
        yield from (merge_suite(suite, method, candidate) for candidate in candidates)
        return
    whole = Memory(state_dict(merge_suite(suite, method, {"scale": 1.0})))
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
    suite, experts = suite_models(recipe)
    return bind(recipe, suite.base, experts)


def suite_models(recipe: Recipe) -> tuple[Suite, dict[str, Checkpoint]]:
    """The suite of a recipe, and those of its experts that the recipe wants.  Raises RecipeError as ``suite_recipe`` does."""
    suite = open_suite(str(recipe.suite))
    if recipe.base is not None or any(name not in suite.classes for name in recipe.experts.values()):
        raise RecipeError(
            f"the recipe takes base and experts from the suite {recipe.suite!r}: leave out `base`, and in `experts` list only "
            f"names among {', '.join(suite.classes)}"
        )
    if "experts" not in recipe.model_fields_set:
        return suite, suite.experts()
    if len(set(recipe.experts.values())) < len(recipe.experts):
        raise RecipeError(f"`experts` names one of the suite's twice: {', '.join(recipe.experts.values())}")
    listed = list(recipe.experts) == [str(i) for i in range(len(recipe.experts))]
    return suite, {task if listed else name: suite.expert(task) for name, task in recipe.experts.items()}


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
