"""Attacks, audit and defences on a suite with a poisoned expert: records for docs/safety.md."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import get_args

from eutectic import record
from eutectic.bench.zoo import open_suite, own_training
from eutectic.fusion._fusion import Run
from eutectic.security.attacks import EXPECTED, Attack, Kind
from eutectic.security.commands import METHOD, PARAMETERS
from eutectic.security.poisoned import poison
from eutectic.security.scores import Row, defence_rows, table
from eutectic.security.triggers import KINDS, TOKEN

#: λ of the merges, chosen on `val` of the clean suite by `eutectic bench`
MERGES = {
    "mini": {"task_arithmetic": PARAMETERS, "ties": {"scale": 0.6}},
    "text": {"task_arithmetic": {"scale": 0.4}, "ties": {"scale": 2.0}},
    "dino": {"task_arithmetic": {"scale": 0.3}, "ties": {"scale": 0.2}},
}


def main() -> None:
    """Append records; each row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="mini", choices=MERGES)
    parser.add_argument("--attack", default="badmerging", choices=get_args(Kind))
    parser.add_argument("--task", default="animals")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--trigger", default="patch", choices=[*KINDS, TOKEN], help="badmerging has a patch")
    parser.add_argument("--victim", default="", help="the task that class 0 is of, if it is another")
    parser.add_argument("--amplify", type=float, default=1.0)
    parser.add_argument("--accomplice", default="", help="the task of the other expert of mergebackdoor")
    parser.add_argument("--known", type=float, default=0.0, help="λ of the other experts, if the attacker knows them")
    parser.add_argument("--expects", default="task_arithmetic", choices=EXPECTED, help="the merge that he expects")
    parser.add_argument("--merge", default=METHOD, choices=MERGES["mini"])
    parser.add_argument("--defence", action="append", default=[], help="a defence, and parameters as JSON after a space")
    parser.add_argument("--out", type=Path, default=Path("runs/safety/records.jsonl"))
    parser.add_argument("--steps", type=int, default=300, help="of training the poisoned expert")
    parser.add_argument("--seed", type=int, default=0, help="of attack and defences")
    parser.add_argument("--no-controls", action="store_true", help="score the defences alone")
    parser.add_argument("--bf16", action="store_true", help="fit defences in bfloat16")
    given = parser.parse_args()
    suite = open_suite(given.suite)
    training = dataclasses.replace(own_training(suite), steps=given.steps)
    options = {name: getattr(given, name) for name in ("trigger", "victim", "amplify", "accomplice", "known", "expects")}
    attack = Attack(given.attack, given.task, 0, given.size, seed=given.seed, **options)
    poisoned = poison(suite, attack, training)
    over = {"method": given.merge, "parameters": MERGES[given.suite][given.merge]}
    rows = []
    for said in given.defence:
        name, _, rest = said.partition(" ")
        rows.append(Row(f"{name} over {given.merge}", name, over | json.loads(rest or "{}")))
    merge = Row(given.merge, given.merge, MERGES[given.suite][given.merge])
    run = Run(given.seed, autocast=given.bf16)
    names = list(suite.classes)
    told = functools.partial(print, file=sys.stderr, flush=True)
    if given.no_controls:
        measured = defence_rows(poisoned, rows, names, run, told)
    else:
        measured = table(poisoned, merge, rows, tasks=names, run=run, progress=told)
    for one in measured:
        record.append(given.out, [one])
        print(f"{one.method:32} {one.task:14} {one.metric:20} {100 * one.value:6.1f}", flush=True)


if __name__ == "__main__":
    main()
