"""How merges keep up as tasks are added, of experts of several kinds: from two tasks to all, absolute and normalised.

A merge of n experts is scored on their n tasks.  Its *normalised* accuracy is the mean over them of its accuracy over that of
the task's expert *of the same kind*.  A kind whose experts are poor divides by less, so both numbers belong together.

Source: Tang et al., ICLR 2024, arXiv:2310.04742, section 5.  Differs from the paper in that scalars are chosen on ``val``, not
on ``test``, that adapters are merged as the products of their factors and not factor by factor, that one order of the tasks is
followed and not all subsets, and that a merge is scored on the tasks that are in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eutectic.bench.evaluate import Choice, Made, Progress, make, require, scored
from eutectic.bench.report import INDIVIDUAL, MEAN
from eutectic.bench.suite import Suite
from eutectic.bench.tuned import make_expert, training_for, with_experts
from eutectic.bench.zoo import own_training
from eutectic.errors import TaskError
from eutectic.fusion._fusion import Protocol, Run
from eutectic.record import Record, mean_of
from eutectic.task import Task
from eutectic.tuning.experts import training_of
from eutectic.tuning.trainer import Kind

KINDS: tuple[Kind, ...] = ("full", "lora", "l_lora")
METHODS = ("average", "task_arithmetic", "ties", "lorahub")
#: few experts want a larger λ than eight do
GRIDS = {"task_arithmetic": {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}}
NORMALISED, ABSOLUTE = "normalised accuracy", "accuracy"
#: between a kind and a method, in the name of a row
OF = ": "


def growing(
    suite: Suite,
    choices: Sequence[Choice],
    experts: Path,
    kinds: Sequence[Kind] = KINDS,
    tasks: Sequence[str] = (),
    *,
    seed: int = 0,
    protocol: Protocol = "inductive",
    progress: Progress = lambda line: None,
) -> Iterator[Record]:
    """The experts of each kind, and merges of the first 2, 3 … of them, each with the mean of its tasks and the normalised one.

    The order of the tasks is that given for ``seed`` 0, else drawn.  Experts lie in folders ``KIND/TASK`` in ``experts``; what
    is not there is trained into it as ``eutectic tune`` does by default, but for a kind that the suite's own experts are of.
    Raises TaskError for fewer than two tasks, UnknownNameError, and as training and fitting do.
    """
    named = list(dict.fromkeys(tasks or suite.classes))
    if len(named) < 2:
        raise TaskError(f"merges are of two tasks or more, not of {', '.join(named) or 'none'}")
    known = [suite.task(name) for name in named]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist() if seed else range(len(known))
    known = [known[at] for at in order]
    require(suite, choices, [task.name for task in known])
    run = Run(seed, protocol)
    for kind in kinds:
        variant = _experts_of(suite, kind, experts, [task.name for task in known], seed, progress)
        yield from _of_kind(variant, kind, choices, known, run, progress)


def _of_kind(
    suite: Suite, kind: Kind, choices: Sequence[Choice], tasks: Sequence[Task], run: Run, progress: Progress
) -> Iterator[Record]:
    """The study of a suite's experts, which are of one kind."""
    network = suite.backbone()

    def rows(made: Mapping[str, Made], n: int, method: str) -> list[Record]:
        said = {"protocol": f"tuning, {n} tasks; {run.protocol}", "seed": run.seed, "method": f"{kind}{OF}{method}"}
        return scored(suite, made, tasks[:n], progress, said)

    alone = rows({task.name: _individual(suite, task.name) for task in tasks}, len(tasks), INDIVIDUAL)
    yield from alone
    own = {one.task: one for one in alone}
    for n in range(2, len(tasks) + 1):
        for choice in choices:
            made = make(suite, network, tasks[:n], run, progress, choice, GRIDS)
            *found, mean = rows(dict.fromkeys(suite.classes, made), n, choice.label)
            yield from (*found, mean)
            if all(own[one.task].value for one in found):
                yield normalised(found, own)


def normalised(records: Sequence[Record], own: Mapping[str, Record]) -> Record:
    """The mean over tasks of an accuracy over the expert's; the interval is the merge's, the experts' accuracies are fixed."""
    shares = [
        dataclasses.replace(one, **{key: getattr(one, key) / own[one.task].value for key in ("value", "low", "high")})
        for one in records
    ]
    mean = mean_of(shares)
    half = sum(((one.high - one.low) / 2) ** 2 for one in shares) ** 0.5 / len(shares)
    return dataclasses.replace(mean, metric=NORMALISED, low=mean.value - half, high=mean.value + half)


def _individual(variant: Suite, name: str) -> Made:
    training = training_of(variant.experts_folder / name) or dataclasses.asdict(own_training(variant))
    about = {"suite": variant.name, "method": INDIVIDUAL, "parameters": training}
    return Made(variant.expert(name), about | {"inputs": {name: variant.fingerprints[name]}})


def _experts_of(suite: Suite, kind: Kind, experts: Path, names: Sequence[str], seed: int, progress: Progress) -> Suite:
    folder = experts / kind
    if not folder.exists() and kind == own_training(suite).kind:
        return suite
    for name in names:
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            training = training_for(suite, kind, seed=seed)

            def told(what: str, done: int, total: int) -> None:
                if done % 100 == 0:
                    progress(f"{kind}{OF}training {what}, {done} of {total}")

            make_expert(suite, name, training, folder / name, progress=told)
    return with_experts(suite, folder)


def plot(records: Sequence[Record], path: Path, drawn: Any) -> None:
    """Draw accuracy and normalised accuracy by the number of tasks into an empty figure, and write it as an SVG."""
    from matplotlib import rc_context

    lines: dict[str, dict[str, dict[int, float]]] = {ABSOLUTE: {}, NORMALISED: {}}
    for one in records:
        n = int(one.protocol.removeprefix("tuning, ").partition(" ")[0])
        if one.task == MEAN and not one.method.endswith(INDIVIDUAL):
            lines[one.metric].setdefault(one.method, {})[n] = 100 * one.value
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "growing", "font.size": 8}):
        drawn.set_size_inches(8.0, 3.4)
        kinds = list(dict.fromkeys(method.partition(OF)[0] for method in lines[ABSOLUTE]))
        methods = list(dict.fromkeys(method.partition(OF)[2] for method in lines[ABSOLUTE]))
        for axes, (metric, those) in zip(drawn.subplots(1, 2), lines.items(), strict=True):
            for method, points in those.items():
                kind, _, name = method.partition(OF)
                style = {"color": f"C{kinds.index(kind)}", "marker": "oxs^Dv<>*"[methods.index(name) % 9]}
                axes.plot(list(points), list(points.values()), linewidth=1, markersize=4, label=method, **style)
            axes.set(xlabel="tasks", ylabel=f"{metric}, %", xticks=sorted({n for points in those.values() for n in points}))
            axes.grid(alpha=0.3)
        axes.legend(fontsize=5, ncols=len(kinds))
        drawn.savefig(path, format="svg", metadata={"Date": None})
