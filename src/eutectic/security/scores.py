"""Records of attacks and defences: accuracy of every task, and what the attacker's trigger does.

Metrics: ``accuracy`` of each task and their mean; of the attacked task ``attack success rate`` and ``robust accuracy``, over
test inputs that are not of the target class; and ``transfer``, the largest gain of a class by the trigger, of every other task.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from eutectic import record, registry
from eutectic.bench.suite import Suite
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.fusion._api import fit, fused
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.merge.api import state_dict
from eutectic.merge.run import Progress, silent
from eutectic.merge.view import Merged
from eutectic.record import Record
from eutectic.security.metrics import predictions, rates, share, transfer
from eutectic.security.poisoned import PoisonedSuite

ASR, ROBUST, TRANSFER = "attack success rate", "robust accuracy", "transfer"
DEFAULT = Run()


def scores(poisoned: PoisonedSuite, network: nn.Module, tasks: Sequence[str], **fields: Any) -> list[Record]:
    """All records of one network on ``tasks``; ``fields`` are those of every record."""
    suite, attack, trigger, _ = poisoned
    accuracies: list[Record] = []
    found: list[Record] = []
    for name in tasks:
        (clean, labels), (triggered, _) = (predictions(network, suite.task(name), one) for one in (None, trigger))

        def recorded(metric: str, value: float, low: float, high: float, n: int, name: str = name) -> Record:
            about: dict[str, Any] = {"suite": suite.name, "versions": record.versions()} | fields
            return Record(task=name, metric=metric, value=value, low=low, high=high, n=n, **about)

        accuracies.append(recorded("accuracy", *share(clean == labels)))
        if name != attack.attacked:
            gain, _ = transfer(clean, triggered, labels, len(suite.classes[name]))
            found.append(recorded(TRANSFER, gain, gain, gain, len(labels)))
        elif (both := rates(triggered, labels, attack.target)) is not None:
            found += [recorded(ASR, *both.asr), recorded(ROBUST, *both.robust)]
    return [*accuracies, record.mean_of(accuracies), *found]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: what it is called, and a merge method or a defence over one, with parameters."""

    label: str
    method: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def controls(poisoned: PoisonedSuite, merge: Row) -> Iterator[tuple[str, Checkpoint]]:
    """θ₀, each poisoned expert alone, and the merge with the honest expert and with the poisoned one."""
    yield "base", poisoned.suite.base
    for task in poisoned.attack.experts:
        label = "poisoned expert" if len(poisoned.attack.experts) == 1 else f"poisoned expert of {task}"
        yield label, poisoned.suite.expert(task)
    for label, suite in (("clean", poisoned.clean), ("poisoned", poisoned.suite)):
        yield f"{merge.label}, {label}", Merged(merge.method, suite.base, suite.experts(), merge.parameters)


def defended(suite: Suite, row: Row, tasks: Sequence[str], run: Run) -> tuple[Checkpoint, str]:
    """What a defence, or a merge, makes of a suite's experts, and the rung if it took one; it sees no label and no trigger."""
    if registry.room_of(row.method) == "methods":
        return Merged(row.method, suite.base, suite.experts(), row.parameters), ""
    models = ModelSet(suite.backbone(), suite.base, suite.experts())
    artefact = fit(row.method, models, [suite.task(name) for name in tasks], row.parameters, run)
    return fused(suite.base, suite.experts(), artefact), artefact.about.get("rung", "")


def table(
    poisoned: PoisonedSuite,
    merge: Row,
    defences: Sequence[Row],
    *,
    tasks: Sequence[str] | None = None,
    run: Run = DEFAULT,
    progress: Progress = silent,
) -> Iterator[Record]:
    """The records of the controls, and of each defence of the poisoned merge."""
    names = list(tasks or poisoned.suite.classes)
    yield from control_rows(poisoned, merge, names, run)
    yield from defence_rows(poisoned, defences, names, run, progress)


def control_rows(poisoned: PoisonedSuite, merge: Row, tasks: Sequence[str], run: Run) -> Iterator[Record]:
    """The records of the controls."""
    for label, weights in controls(poisoned, merge):
        network = poisoned.suite.backbone(Memory(state_dict(weights)))
        yield from scores(poisoned, network, tasks, method=label, seed=run.seed, notes=f"control; {poisoned.attack.said}")


def defence_rows(
    poisoned: PoisonedSuite, defences: Sequence[Row], tasks: Sequence[str], run: Run, progress: Progress = silent
) -> Iterator[Record]:
    """The records of each defence; seconds are those of making the weights."""
    for number, row in enumerate(defences, start=1):
        progress(row.label, number, len(defences))
        started = time.perf_counter()
        weights, rung = defended(poisoned.suite, row, tasks, run)
        network = poisoned.suite.backbone(Memory(state_dict(weights)))
        wall_s = time.perf_counter() - started
        notes = f"defence; {poisoned.attack.said}" + (f"; took {rung}" if rung else "")
        notes += "; bfloat16" * run.autocast
        about: dict[str, Any] = {"parameters": row.parameters, "protocol": "inductive", "notes": notes}
        for one in scores(poisoned, network, tasks, method=row.label, seed=run.seed, **about):
            yield dataclasses.replace(one, wall_s=wall_s)
