"""How far a fused network reaches: tasks that none of its experts knew, and images worse than those it was made for.

Both protocols yield records.  ``protocol`` says which tasks are unseen, or what was adapted to; ``split`` says how the scored
images are corrupted; ``notes`` says of each task of a generalisation whether it was seen.

Source: Yang et al., AdaMerging, ICLR 2024, arXiv:2310.02575, and those who took its protocols over: Tang et al., ICML 2024,
arXiv:2402.00433, and FusionBench, 2024, arXiv:2406.03280.  Differs from the papers in that methods adapt on inputs that are not
those of the test (protocol: transductive does as they did), that scalars of closed forms are chosen on ``val``, that robustness
is also measured of what was adapted to clean inputs, and in the corruptions, see ``bench.corruptions``.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from eutectic import record, registry
from eutectic.bench.backbones import fill
from eutectic.bench.corruptions import corrupted
from eutectic.bench.evaluate import Progress, choose, evaluate, merge_suite
from eutectic.bench.suite import Suite
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.errors import TaskError
from eutectic.fusion._api import fit, fused
from eutectic.fusion._api import method as bound
from eutectic.fusion._fusion import ModelSet, Protocol, Run
from eutectic.merge.api import state_dict
from eutectic.merge.recipe import Recipe
from eutectic.record import Record
from eutectic.task import Task

#: methods of either room by name, with their parameters
Methods = Mapping[str, Mapping[str, Any]]


class Parting(NamedTuple):
    """The names of the tasks whose experts are fused, and of those that only score."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]


class Made(NamedTuple):
    """Weights, fields of the records of them, and how long it took to make them."""

    weights: Checkpoint
    fields: Mapping[str, Any]
    wall_s: float = 0.0


def partings(suite: Suite) -> list[Parting]:
    """A suite's last two tasks unseen, and then its first two: of eight tasks six are seen, as in the papers.

    Raises TaskError if that leaves no two tasks to fuse.
    """
    names = tuple(suite.classes)
    if len(names) < 4:
        raise TaskError(f"suite {suite.name!r} has {len(names)} tasks: with two unseen, at least 4 are needed")
    return [Parting(names[:-2], names[-2:]), Parting(names[2:], names[:2])]


def generalisation(
    suite: Suite,
    methods: Methods,
    parted: Sequence[Parting] | None = None,
    *,
    seed: int = 0,
    protocol: Protocol = "inductive",
    progress: Progress = lambda line: None,
) -> Iterator[Record]:
    """θ₀, the experts one by one, and what each method makes of the seen tasks alone, scored on seen and unseen tasks.

    Each ends with the means of the seen, of the unseen and of all tasks, the last of which has the time of fitting in it.
    ``parted`` is ``partings(suite)`` by default.  Raises TaskError for a task that is both seen and unseen, or if there are
    none of either, and as fitting does.
    """
    for seen, unseen in partings(suite) if parted is None else parted:
        if both := sorted({*seen} & {*unseen}):
            raise TaskError(f"{', '.join(both)}: cannot be both seen and unseen")
        if not seen or not unseen:
            raise TaskError("a generalisation needs at least one task that is seen and one that is not")
        tasks = [suite.task(name) for name in (*seen, *unseen)]
        network = suite.backbone()
        common = {"seed": seed, "protocol": f"generalisation: unseen {', '.join(unseen)}; {protocol}"}
        _require(suite, methods, seen)
        known, run = tasks[: len(seen)], Run(seed, protocol)
        made = (_made(suite, network, known, run, progress, *method) for method in methods.items())
        for row in itertools.chain(_references(suite, tasks), (dict.fromkeys((*seen, *unseen), one) for one in made)):
            records = _scored(network, row, tasks, progress, common)
            parts = [_noted(one, "seen" if one.task in seen else "unseen") for one in records]
            yield from parts
            yield record.mean_of(parts[: len(seen)], "mean of seen")
            yield record.mean_of(parts[len(seen) :], "mean of unseen")
            yield _mean(records, row)


def robustness(
    suite: Suite,
    methods: Methods,
    kinds: Sequence[str],
    severities: Sequence[int],
    tasks: Sequence[str] | None = None,
    *,
    seed: int = 0,
    protocol: Protocol = "inductive",
    progress: Progress = lambda line: None,
) -> Iterator[Record]:
    """θ₀, the experts and every method, scored on clean and on corrupted test sets; each set ends with its mean.

    A method that is fitted is scored twice on every corruption: fitted once to clean inputs, and to inputs corrupted alike.
    Closed forms look at no inputs, and their scalars are chosen on clean ``val``, so they come once.  ``tasks`` are the
    suite's by default.  Raises TaskError for a suite without images, UnknownNameError, ParameterError, and as fitting does.
    """
    clean = [suite.task(name) for name in tasks or suite.classes]
    names = [task.name for task in clean]
    conditions = list(itertools.product(kinds, severities))
    for condition in conditions:  # what cannot be done is refused before an hour of scoring
        corrupted(clean[0], *condition)
    _require(suite, methods, names)
    network = suite.backbone()
    run = Run(seed, protocol)

    def scored(row: Mapping[str, Made], on: Sequence[Task], split: str, adapted: str) -> Iterator[Record]:
        common = {"seed": seed, "protocol": f"robustness: adapted to {adapted} inputs; {protocol}"}
        found = _scored(network, row, on, progress, common, split)
        yield from [*found, _mean(found, row)]

    made = (_made(suite, network, clean, run, progress, *method) for method in methods.items())
    for row in itertools.chain(_references(suite, clean), (dict.fromkeys(names, one) for one in made)):
        yield from scored(row, clean, "test", "clean")
        for kind, severity in conditions:
            worse = [corrupted(task, kind, severity, seed) for task in clean]
            yield from scored(row, worse, f"test, {kind} {severity}", "clean")
    for method, parameters in methods.items():
        if registry.room_of(method) != "fusion":
            continue
        for kind, severity in conditions:
            worse = [corrupted(task, kind, severity, seed, ("adapt", "test")) for task in clean]
            found = _made(suite, network, worse, run, progress, method, parameters)
            # no recipe says what the inputs were
            found = found._replace(fields={**found.fields, "recipe_sha256": ""})
            yield from scored(dict.fromkeys(names, found), worse, f"test, {kind} {severity}", "corrupted")


def _require(suite: Suite, methods: Methods, experts: Sequence[str]) -> None:
    """Refuse what cannot be fused."""
    for method, parameters in methods.items():
        if registry.room_of(method) == "fusion":
            bound(method, parameters)
        else:
            merge_suite(suite, method, parameters, list(experts))


def _made(
    suite: Suite,
    network: nn.Module,
    tasks: Sequence[Task],
    run: Run,
    progress: Progress,
    method: str,
    parameters: Mapping[str, Any],
) -> Made:
    """What a method makes of the tasks' experts; it sees these tasks and no other."""
    record.reset_peak_rss()
    started = time.perf_counter()
    names = [task.name for task in tasks]
    if registry.room_of(method) == "fusion":
        experts = suite.experts(names)
        run = dataclasses.replace(run, progress=_told(progress, method))
        artefact = fit(method, ModelSet(suite.backbone(), suite.base, experts), tasks, parameters, run)
        weights, parameters, notes = fused(suite.base, experts, artefact), artefact.about["parameters"], ""
    else:
        given = Recipe(method=method, parameters=dict(parameters), seed=run.seed).bound_parameters()
        weights, notes = choose(suite, network, method, tasks, given, progress)
        parameters = weights.parameters
    recipe = Recipe(
        method=method,
        suite=suite.name,
        experts={} if names == list(suite.classes) else {str(at): name for at, name in enumerate(names)},
        parameters=dict(parameters),
        seed=run.seed,
        protocol=run.protocol,
    )
    whole = Memory(state_dict(weights))
    fields = {"method": method, "parameters": parameters, "recipe_sha256": recipe.sha256(), "notes": notes}
    inputs = {name: suite.fingerprints[name] for name in ("base", *names)}
    return Made(whole, {"suite": suite.name, "inputs": inputs} | fields, time.perf_counter() - started)


def _references(suite: Suite, tasks: Sequence[Task]) -> Iterator[dict[str, Made]]:
    """By task: θ₀, and then the task's own expert."""
    names = [task.name for task in tasks]

    def known(method: str, name: str, weights: Checkpoint) -> Made:
        return Made(weights, {"suite": suite.name, "method": method, "inputs": {name: suite.fingerprints[name]}})

    yield dict.fromkeys(names, known("pretrained", "base", suite.base))
    yield {name: known("individual", name, suite.expert(name)) for name in names}


def _scored(
    network: nn.Module,
    row: Mapping[str, Made],
    tasks: Sequence[Task],
    progress: Progress,
    common: Mapping[str, Any],
    split: str = "test",
) -> list[Record]:
    """A record a task, of the weights that ``row`` has for it; ``split`` is what the records call the test set."""
    found: list[Record] = []
    held = None
    for task in tasks:
        made = row[task.name]
        progress(f"{made.fields['method']}: {task.name}, {split}")
        if made is not held:
            fill(network, made.weights)
            held = made
        found += evaluate(network, [task], **{**made.fields, **common})
    return [dataclasses.replace(one, split=split) for one in found]


def _mean(records: list[Record], row: Mapping[str, Made]) -> Record:
    mean = record.mean_of(records)
    return dataclasses.replace(mean, wall_s=mean.wall_s + row[records[0].task].wall_s)


def _noted(one: Record, role: str) -> Record:
    return dataclasses.replace(one, notes=f"{role}; {one.notes}" if one.notes else role)


def _told(progress: Progress, method: str) -> Callable[[str, int, int], None]:
    def told(what: str, done: int, total: int) -> None:
        if done in (1, total) or done % 20 == 0:
            progress(f"{method}: {what}, {done} of {total}")

    return told
