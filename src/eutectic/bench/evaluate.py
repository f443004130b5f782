"""Score networks on tasks, and fuse-and-score whole suites: the numbers of the demo, the benchmark and `eutectic eval`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from eutectic import record, registry
from eutectic.bench.suite import Suite
from eutectic.bench.zoo import open_suite
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Lerp
from eutectic.errors import LayoutError, RecipeError, TaskError
from eutectic.fusion._api import fit, fused
from eutectic.fusion._api import method as fusion_method
from eutectic.fusion._folder import filled
from eutectic.fusion._fusion import Artefact, ModelSet, Protocol, Run
from eutectic.fusion._routed import Description
from eutectic.merge.api import state_dict
from eutectic.merge.recipe import Recipe
from eutectic.merge.run import bind
from eutectic.merge.view import Merged
from eutectic.record import Record
from eutectic.task import Task
from eutectic.tuning.experts import training_of

Progress = Callable[[str], None]
#: the values of each parameter that are tried
Axes = Mapping[str, Sequence[Any]]
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


class Choice(NamedTuple):
    """A registered method, and parameters of it that are not to be chosen."""

    method: str
    parameters: Mapping[str, Any] = {}

    @property
    def label(self) -> str:
        """What records call it: the method, and the parameters as they were given."""
        given = ", ".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.method}({given})" if given else self.method


class Made(NamedTuple):
    """Weights, fields of the records of them, how long it took to make them, and which layers of the network are routed."""

    weights: Checkpoint
    fields: Mapping[str, Any]
    wall_s: float = 0.0
    layers: Mapping[str, Description] = {}


def run_suite(
    suite: Suite,
    choices: Sequence[Choice],
    *,
    seeds: Sequence[int] = (0,),
    protocols: Sequence[Protocol] = ("inductive",),
    progress: Progress = lambda line: None,
) -> Iterator[Record]:
    """θ₀, the experts one by one, and every method on a suite's test sets; ends each with a ``mean`` record.

    A closed-form method's ``GRID`` is searched on the tasks' ``val`` splits (labelled training images that no expert saw),
    never on ``test``; ties go to the first candidate.  Others are fitted with each of the seeds under each protocol.
    """
    require(suite, choices, list(suite.classes))  # what cannot be fused is refused before an hour of scoring
    network = suite.backbone()
    for row in references(suite, suite.tasks):
        yield from scored(suite, row, suite.tasks, progress, {"protocol": "inductive"})
    for choice in choices:
        fitted = registry.room_of(choice.method) == "fusion"
        runs = [Run(seed, protocol) for protocol in protocols for seed in seeds] if fitted else [Run()]
        for run in runs:
            made = make(suite, network, suite.tasks, run, progress, choice)
            yield from scored(suite, dict.fromkeys(suite.classes, made), suite.tasks, progress, made.fields)


def require(suite: Suite, choices: Sequence[Choice], experts: Sequence[str]) -> None:
    """Refuse what cannot be fused: UnknownNameError, ParameterError, LayoutError."""
    for method, parameters in choices:
        if registry.room_of(method) == "fusion":
            fusion_method(method, parameters)
        else:
            merge_suite(suite, method, parameters, list(experts))


def make(
    suite: Suite,
    network: nn.Module,
    tasks: Sequence[Task],
    run: Run,
    progress: Progress,
    choice: Choice,
    grids: Mapping[str, Axes] = MappingProxyType({}),
) -> Made:
    """What a method makes of the tasks' experts; it sees these tasks and no other.

    The scalars of a closed form are chosen on ``val`` among those of its ``GRID``, or of ``grids`` by the method's name; peak
    memory counts from here on.
    """
    record.reset_peak_rss()
    started = time.perf_counter()
    names, layers = [task.name for task in tasks], {}
    method, parameters = choice
    if registry.room_of(method) == "fusion":
        artefact = fitted(suite, tasks, run, progress, choice)
        weights, parameters, notes = (
            fused(suite.base, suite.experts(names), artefact),
            artefact.about["parameters"],
            artefact.about.get("notes", ""),
        )
        layers = artefact.about.get("layers", {})
    else:
        given = Recipe(method=method, parameters=dict(parameters), seed=run.seed).bound_parameters()
        weights, notes = choose(suite, network, method, tasks, given, progress, grids.get(method))
        parameters = weights.parameters
    fields = described(suite, names, run, choice.label, method, parameters) | {"notes": notes}
    return Made(Memory(state_dict(weights)), fields, time.perf_counter() - started, layers)


def fitted(suite: Suite, tasks: Sequence[Task], run: Run, progress: Progress, choice: Choice) -> Artefact:
    """What a method is fitted to of the tasks' experts; it sees these tasks and no other."""
    told = functools.partial(_told, progress, f"{choice.label}, {run.protocol}, seed {run.seed}")
    models = ModelSet(suite.backbone(), suite.base, suite.experts([task.name for task in tasks]))
    return fit(choice.method, models, tasks, choice.parameters, dataclasses.replace(run, progress=told))


def described(
    suite: Suite, names: Sequence[str], run: Run, label: str, method: str, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """What records say of weights that a method made of some experts."""
    recipe = Recipe(
        method=method,
        suite=suite.name,
        experts={} if list(names) == list(suite.classes) else {str(at): name for at, name in enumerate(names)},
        parameters=dict(parameters),
        seed=run.seed,
        protocol=run.protocol,
    )
    fields = {"method": label, "parameters": parameters, "recipe_sha256": recipe.sha256()}
    fields |= {"seed": run.seed, "protocol": run.protocol, "suite": suite.name}
    return fields | {"inputs": {name: suite.fingerprints[name] for name in ("base", *names)}}


def references(suite: Suite, tasks: Sequence[Task]) -> Iterator[dict[str, Made]]:
    """By task: θ₀, and then the task's own expert."""
    names = [task.name for task in tasks]

    def known(method: str, name: str, weights: Checkpoint) -> Made:
        return Made(weights, {"suite": suite.name, "method": method, "inputs": {name: suite.fingerprints[name]}})

    yield dict.fromkeys(names, known("pretrained", "base", suite.base))
    yield {name: known("individual", name, suite.expert(name)) for name in names}


def scored(
    suite: Suite,
    row: Mapping[str, Made],
    tasks: Sequence[Task],
    progress: Progress,
    common: Mapping[str, Any],
    split: str = "test",
) -> list[Record]:
    """A record a task, of the weights that ``row`` has for it, and their mean, which has the time of making them in it.

    ``split`` is what the records call the test set.
    """
    found: list[Record] = []
    held, network = None, None
    for task in tasks:
        made = row[task.name]
        progress(f"{made.fields['method']}: {task.name}, {split}")
        if network is None or made is not held:
            held, network = made, suite.backbone(made.weights, made.layers)
        found += evaluate(network, [task], **{**made.fields, **common})
    found = [dataclasses.replace(one, split=split) for one in found]
    mean = record.mean_of(found)
    return [*found, dataclasses.replace(mean, wall_s=mean.wall_s + row[tasks[0].name].wall_s)]


def _told(progress: Progress, said: str, what: str, done: int, total: int) -> None:
    if done in (1, total) or done % 20 == 0:
        progress(f"{said}: {what}, {done} of {total}")


def choose(
    suite: Suite,
    network: nn.Module,
    method: str,
    tasks: Sequence[Task],
    given: Mapping[str, Any],
    progress: Progress = lambda line: None,
    axes: Axes | None = None,
) -> tuple[Merged, str]:
    """The merge of the experts of some tasks that does best on their ``val``, and a note that says so.

    What is ``given`` is kept; what else ``axes``, or the method's ``GRID``, propose is searched.  Ties go to the first one.
    """
    experts = [task.name for task in tasks]
    candidates: list[dict[str, Any]] = []
    for proposed in grid(method, axes):
        candidate = {name: value for name, value in proposed.items() if name not in given}
        if candidate not in candidates:
            candidates.append(candidate)
    chosen, notes = candidates[0], ""
    if len(candidates) > 1:
        scores = []
        for number, merged in enumerate(_candidates(suite, method, candidates, experts, given), start=1):
            progress(f"{method}: choosing on val, {number} of {len(candidates)}")
            filled(network, merged)
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


def grid(method: str, axes: Axes | None = None) -> Iterator[dict[str, Any]]:
    """The candidates of ``axes``, or those of the ``GRID`` in a method's file; just the defaults if it proposes none."""
    axes = getattr(registry.module("methods", method), "GRID", {}) if axes is None else axes
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
    """The method and recipe of a folder that Eutectic wrote, or how it was trained; of another, its name."""
    if training := training_of(model):
        return {"method": training["kind"], "parameters": training, "seed": training["seed"]}
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
