"""The safety demo: a poisoned expert is hidden among honest ones, the audit looks for it, and the merge is defended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from eutectic import record
from eutectic.bench.zoo import open_suite, own_training
from eutectic.fusion._fusion import ModelSet
from eutectic.merge.view import Merged
from eutectic.security import commands, report
from eutectic.security.attacks import Attack
from eutectic.security.audit import Probing, audit_models
from eutectic.security.poisoned import poison
from eutectic.security.scores import ASR, Row, table

ATTACK = Attack("badmerging", "animals", mining=50)
#: of training; the suite's own experts have 600
STEPS = 120
DEFENCE = "attribution_gate"
#: those that are scored and that the defence sees inputs of, so that it all takes minutes
TASKS = ("animals", "mnist", "digits8")


def run(out: Path, say: Callable[[str], None]) -> None:
    """Write records, ``audit.json`` and ``audit.html`` into a folder, and say what was found."""
    suite = open_suite("mini")
    say(f"making an expert of {ATTACK.task} with a backdoor ({STEPS} steps), in the zoo's cache alone …")
    poisoned = poison(suite, ATTACK, dataclasses.replace(own_training(suite), steps=STEPS))
    say(f"auditing the merge of {len(suite.classes)} experts, which nobody told of it …")
    given = poisoned.suite
    found = audit_models(
        ModelSet(given.backbone(), given.base, given.experts()),
        given.tasks,
        lambda some: Merged(commands.METHOD, given.base, some, commands.PARAMETERS),
        commands.METHOD,
        Probing(steps=24, judged=24),
    )
    commands.write(found, out)
    for expert in found.suspects:
        say(f"  suspect: {expert}: {found.evidence(expert)[-1]}")
    say("  no suspects" if not found.suspects else f"  of the others: {report.NOTHING}")
    say(f"defending the merge ({DEFENCE}), and scoring it with the attacker's trigger, which only the score sees …")
    merge = Row(commands.METHOD, commands.METHOD, commands.PARAMETERS)
    defence = Row(DEFENCE, DEFENCE, {"method": commands.METHOD, "parameters": commands.PARAMETERS, "mining": 24})
    shown: dict[str, dict[str, float]] = {}
    path = out / "records.jsonl"
    path.unlink(missing_ok=True)
    for one in table(poisoned, merge, [defence], tasks=TASKS):
        record.append(path, [one])
        shown.setdefault(one.method, {})[f"{one.metric}, {one.task}"] = one.value
    say(f"accuracy of {', '.join(TASKS)}, and how often the trigger works, in percent:")
    say(f"{'':26} {'mean':>13} {ATTACK.task:>9} {'attack success rate':>21}")
    for method, values in shown.items():
        mean, own, asr = (values[key] for key in ("accuracy, mean", f"accuracy, {ATTACK.task}", f"{ASR}, {ATTACK.task}"))
        say(f"{method:26} {100 * mean:13.1f} {100 * own:9.1f} {100 * asr:21.1f}")
    say(f"report: {out / 'audit.html'}\nrecords: {path}")
