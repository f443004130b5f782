"""Fronts: the accuracies that each preference among some tasks is worth, and how much of all that could be they cover.

A point is scored on ``test``; its preference is in ``parameters``.  A front ends with its ``hypervolume``, the volume of
accuracies that some point of it reaches in all tasks at once, out of 1 (reference point: an accuracy of 0 in each task), and
its ``spread``, the mean over tasks of the best less the worst accuracy among the points that no other point dominates.  As
both only depend on accuracies, the bounds of the former are those of all accuracies at their own bounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from eutectic import record, registry
from eutectic.bench.evaluate import Choice, Made, Progress, described, fitted, make, references, require, scored
from eutectic.bench.suite import Suite
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.errors import EutecticError, TaskError
from eutectic.fusion._api import method, unloaded
from eutectic.fusion._folder import filled
from eutectic.fusion._fusion import Protocol, Run
from eutectic.fusion._preferences import corners_and_centre, simplex_grid
from eutectic.merge.api import state_dict
from eutectic.merge.view import Merged
from eutectic.record import Record
from eutectic.task import Task

#: into how many parts a grid of preferences divides each of its axes, by the number of tasks; 1 for more
PARTS = {2: 10, 3: 5, 4: 3}
#: what interpolation multiplies λ = p by; one of them is chosen on ``val``
SCALES = (0.8, 1.0, 1.2, 1.5, 2.0)
#: which tasks a panel of a plot has, by how many there are
PANELS: Mapping[int, list[tuple[int, int]]] = {2: [(0, 1)], 3: [(0, 1), (0, 2), (1, 2)]}
#: between a front's name and the preference of a point of it
AT = " at "

Preference = tuple[float, ...]


class Front(NamedTuple):
    """A name, and what makes the network of each of its preferences."""

    name: str
    preferences: Sequence[Preference]
    made: Callable[[Preference], Made]


def grid(k: int, parts: int | None = None) -> list[Preference]:
    """Preferences over the whole simplex, and the one in its middle."""
    points = simplex_grid(k, parts or PARTS.get(k, 1)).tolist()
    centre = corners_and_centre(k)[-1].tolist()
    return [tuple(p) for p in (points if centre in points else [*points, centre])]


def pareto(
    suite: Suite,
    choices: Sequence[Choice],
    tasks: Sequence[str],
    *,
    parts: int | None = None,
    seed: int = 0,
    protocol: Protocol = "inductive",
    progress: Progress = lambda line: None,
) -> Iterator[Record]:
    """The fronts of methods that take a preference, and of three that they have to beat on the same tasks.

    These are task arithmetic with λₖ = s pₖ on the same grid, its s chosen on ``val`` by hypervolume; and coefficients fitted
    anew for each corner and the centre, by the weighted loss or by MGDA, as ``pwe_moe`` without a router, all else the same as
    in the first choice.  Raises TaskError for fewer than two tasks, EutecticError for a method without preferences or where
    moocore is missing, and as fitting does.
    """
    if len(set(tasks)) < max(2, len(tasks)):
        raise TaskError(f"a front is between two tasks or more, each named once, not {', '.join(tasks) or 'none'}")
    for choice in choices:
        if registry.room_of(choice.method) != "fusion" or "preference" not in method(*choice).free:
            raise EutecticError(f"{choice.method} takes no preference, so it has no front; pwe_moe does")
    _moocore()
    require(suite, choices, list(tasks))
    known, network, run = [suite.task(name) for name in tasks], suite.backbone(), Run(seed, protocol)
    for row in references(suite, known):
        yield from scored(suite, row, known, progress, {"seed": seed, "protocol": protocol})
    points, ends = grid(len(tasks), parts), [tuple(p) for p in corners_and_centre(len(tasks)).tolist()]

    def alone(how: str) -> Callable[[Preference], Made]:
        shared = dict(choices[0].parameters) if choices else {}

        def made(p: Preference) -> Made:
            more = {"hidden": 0, "scalarisation": how, "only": list(p), "preference": list(p)}
            return make(suite, network, known, run, progress, Choice("pwe_moe", shared | more))

        return made

    fronts = [Front(choice.label, points, _routed(suite, known, run, progress, choice)) for choice in choices]
    fronts.append(Front("task_arithmetic", points, _interpolated(suite, network, known, points, progress)))
    fronts += [Front(f"{how}, one by one", ends, alone(how)) for how in ("linear", "mgda")]
    for front in fronts:
        found: list[list[Record]] = []
        for p in front.preferences:
            made = front.made(p)
            said = {"method": f"{front.name}{AT}{' : '.join(f'{weight:.3g}' for weight in p)}"}
            said |= {"parameters": {**made.fields["parameters"], "preference": list(p)}, "seed": seed, "protocol": protocol}
            found.append(scored(suite, dict.fromkeys(tasks, made), known, progress, said))
            yield from found[-1]
        yield from measured(front.name, found)


def _routed(suite: Suite, tasks: Sequence[Task], run: Run, progress: Progress, choice: Choice) -> Callable[[Preference], Made]:
    """One fit for all preferences, made when the first is asked for."""
    names, fits = [task.name for task in tasks], []
    base, experts = _held(suite, names)

    def made(p: Preference) -> Made:
        if not fits:
            fits.append(fitted(suite, tasks, run, progress, choice))
        weights = unloaded(base, experts, fits[0], list(p))
        parameters = {**fits[0].about["parameters"], "preference": list(p)}
        fields = described(suite, names, run, choice.label, choice.method, parameters)
        looks = ", ".join(f"{loss:.4g} at {step}" for step, _, loss in fits[0].about["history"] if loss is not None)
        return Made(Memory(state_dict(weights)), fields | {"notes": f"held-out loss by step: {looks}"})

    return made


def _interpolated(
    suite: Suite, network: nn.Module, tasks: Sequence[Task], points: Sequence[Preference], progress: Progress
) -> Callable[[Preference], Made]:
    """Task arithmetic with λₖ = s pₖ; s is chosen when the first point is asked for."""
    names, chosen = [task.name for task in tasks], []
    base, experts = _held(suite, names)

    def merged(p: Preference, scale: float) -> Checkpoint:
        return Merged("task_arithmetic", base, experts, {"scale": scale, "weights": list(p)})

    def worth(scale: float) -> float:
        progress(f"task_arithmetic: choosing on val, scale {scale}")
        found = []
        for p in points:
            filled(network, merged(p, scale))
            found.append([task.score(network, "val").value for task in tasks])
        return hypervolume(found)

    def made(p: Preference) -> Made:
        if not chosen:
            chosen.append(max(SCALES, key=worth))
        parameters = {"scale": chosen[0], "weights": list(p)}
        fields = described(suite, names, Run(), "task_arithmetic", "task_arithmetic", parameters)
        notes = f"scale {chosen[0]} chosen on val among {len(SCALES)} candidates, by hypervolume"
        return Made(Memory(state_dict(merged(p, chosen[0]))), fields | {"notes": notes})

    return made


def _held(suite: Suite, names: Sequence[str]) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Base and experts in memory, for they are read once a point."""
    return Memory(state_dict(suite.base)), {name: Memory(state_dict(suite.expert(name))) for name in names}


def measured(name: str, points: Sequence[Sequence[Record]]) -> list[Record]:
    """The hypervolume and the spread of a front, of the records of each of its points (and their mean)."""
    value, low, high = (
        np.array([[getattr(r, key) for r in those[:-1]] for those in points]) for key in ("value", "low", "high")
    )
    first = points[0][0]
    tasks = ", ".join(r.task for r in points[0][:-1])
    parameters: dict[str, Any] = {key: v for key, v in first.parameters.items() if key not in ("preference", "weights", "only")}
    whole = dataclasses.replace(
        record.mean_of([mean for *_, mean in points], tasks),
        method=name,
        metric="hypervolume",
        value=hypervolume(value),
        low=hypervolume(low),
        high=hypervolume(high),
        n=first.n,
        parameters=parameters,
        recipe_sha256="",
        notes=f"{len(points)} points, reference point 0; {first.notes}",
    )
    best = value[_moocore().is_nondominated(value, maximise=True)]
    extent = float(np.mean(best.max(0) - best.min(0)))
    return [whole, dataclasses.replace(whole, metric="spread", value=extent, low=extent, high=extent)]


def hypervolume(points: Sequence[Sequence[float]] | np.ndarray) -> float:
    """The volume of what lies below some point ``[n, K]`` in all coordinates, and above 0.  Raises EutecticError."""
    found = np.asarray(points, dtype=float)
    return float(_moocore().hypervolume(found, ref=np.zeros(found.shape[1]), maximise=True))


def _moocore() -> Any:
    try:
        import moocore
    except ImportError:
        raise EutecticError("hypervolumes need moocore: pip install 'eutectic[pareto]'") from None
    return moocore


def figure() -> Any:
    """An empty figure.  Raises EutecticError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EutecticError("plots need matplotlib: pip install 'eutectic[pareto]'") from None
    return Figure(layout="constrained")


def plot(records: Sequence[Record], path: Path, drawn: Any) -> None:
    """Draw the fronts of two or three tasks into an empty figure, each pair of them in a panel, and write it as an SVG.

    Raises EutecticError for records of another number of tasks.
    """
    from matplotlib import rc_context

    fronts: dict[str, dict[str, dict[str, float]]] = {}
    for one in records:
        if one.metric == "accuracy" and one.task != "mean":
            fronts.setdefault(one.method.partition(AT)[0], {}).setdefault(one.method, {})[one.task] = 100 * one.value
    tasks = list(next(iter(next(iter(fronts.values())).values())))
    if len(tasks) not in PANELS:
        raise EutecticError(f"fronts of two or three tasks are drawn, not of {len(tasks)}")
    panels = PANELS[len(tasks)]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fronts", "font.size": 8}):
        drawn.set_size_inches(3.4 * len(panels), 3.2)
        for axes, (x, y) in zip(np.ravel(drawn.subplots(1, len(panels))), panels, strict=True):
            for (name, points), marker in zip(fronts.items(), "xPos^Dv<>*" * len(fronts), strict=False):
                along = [[found[tasks[at]] for found in points.values()] for at in (x, y)]
                joined = len(tasks) == 2 and len(along[0]) > 3
                axes.plot(*along, marker=marker, markersize=4, linewidth=1 if joined else 0, label=name)
            axes.set(xlabel=f"{tasks[x]}, %", ylabel=f"{tasks[y]}, %")
            axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
        drawn.savefig(path, format="svg", metadata={"Date": None})
