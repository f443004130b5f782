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
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from eutectic import record, registry
from eutectic.bench.corruptions import corrupted
from eutectic.bench.evaluate import Choice, Made, Progress, make, references, require, scored
from eutectic.bench.suite import Suite
from eutectic.errors import TaskError
from eutectic.fusion._fusion import Protocol, Run
from eutectic.record import Record
from eutectic.task import Task


class Parting(NamedTuple):
    """The names of the tasks whose experts are fused, and of those that only score."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]


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
    choices: Sequence[Choice],
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
        require(suite, choices, seen)
        known, run = tasks[: len(seen)], Run(seed, protocol)
        made = (make(suite, network, known, run, progress, choice) for choice in choices)
        for row in itertools.chain(references(suite, tasks), (dict.fromkeys((*seen, *unseen), one) for one in made)):
            *records, mean = scored(suite, row, tasks, progress, common)
            parts = [_noted(one, "seen" if one.task in seen else "unseen") for one in records]
            yield from parts
            yield record.mean_of(parts[: len(seen)], "mean of seen")
            yield record.mean_of(parts[len(seen) :], "mean of unseen")
            yield mean


def robustness(
    suite: Suite,
    choices: Sequence[Choice],
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
    require(suite, choices, names)
    network = suite.backbone()
    run = Run(seed, protocol)

    def scores(row: Mapping[str, Made], on: Sequence[Task], split: str, adapted: str) -> list[Record]:
        common = {"seed": seed, "protocol": f"robustness: adapted to {adapted} inputs; {protocol}"}
        return scored(suite, row, on, progress, common, split)

    made = (make(suite, network, clean, run, progress, choice) for choice in choices)
    for row in itertools.chain(references(suite, clean), (dict.fromkeys(names, one) for one in made)):
        yield from scores(row, clean, "test", "clean")
        for kind, severity in conditions:
            worse = [corrupted(task, kind, severity, seed) for task in clean]
            yield from scores(row, worse, f"test, {kind} {severity}", "clean")
    for choice in choices:
        if registry.room_of(choice.method) != "fusion":
            continue
        for kind, severity in conditions:
            worse = [corrupted(task, kind, severity, seed, ("adapt", "test")) for task in clean]
            found = make(suite, network, worse, run, progress, choice)
            # no recipe says what the inputs were
            found = found._replace(fields={**found.fields, "recipe_sha256": ""})
            yield from scores(dict.fromkeys(names, found), worse, f"test, {kind} {severity}", "corrupted")


def _noted(one: Record, role: str) -> Record:
    return dataclasses.replace(one, notes=f"{role}; {one.notes}" if one.notes else role)
