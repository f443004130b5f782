"""How well an audit tells merges with a poisoned expert from honest ones: AUROC, false flags, and whether it names the expert.

    python benchmarks/audit_panel.py --suite mini --merges 20

As many honest merges as poisoned ones, each of four experts drawn anew, by task arithmetic and TIES in turns.  In a poisoned
one the expert of one of the four tasks is an attacker's: attacks, sizes and target classes take turns, and two merges share an
attacker.  An audit's score is by how much what it found is above what it takes for evidence, at most; these thresholds were set
before, on other attackers; the honest experts are the suite's, in other merges.  Records have every expert's gain and each
merge's score, and at the end the panel's numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from eutectic import record
from eutectic.bench.suite import Suite
from eutectic.bench.zoo import open_suite, own_training
from eutectic.fusion._fusion import ModelSet
from eutectic.merge.view import Merged
from eutectic.record import Record
from eutectic.security.attacks import Attack, Kind
from eutectic.security.audit import Probing, audit_models
from eutectic.security.metrics import share
from eutectic.security.poisoned import poison

#: and pixels; the images of `mini` have 42 a side, those of `dino` 56
ATTACKS: list[tuple[Kind, int]] = [("badmerging", 8), ("badnets", 6), ("badmerging", 6), ("badnets", 8), ("badmerging", 7)]
MERGES = [("task_arithmetic", {"scale": 0.3}), ("ties", {"scale": 0.6})]
EXPERTS, SHARED = 4, 2


class Audited(NamedTuple):
    """A merge's audit: whose expert is poisoned if one is, each expert's gain, what speaks most, against whom, and suspects."""

    attack: Attack | None
    gains: dict[str, tuple[float, float, float]]
    score: float
    first: str
    suspects: list[str]
    seconds: float


def panel(suite: Suite, merges: int, steps: int) -> Iterator[tuple[Audited, str]]:
    """Honest and poisoned merges by turns, with what each is."""
    training = dataclasses.replace(own_training(suite), steps=steps)
    names = list(suite.classes)
    for number in range(merges):
        for poisoned in (False, True):
            draw, attack, source = random.Random(2 * number + poisoned), None, suite
            if poisoned:
                at = number // SHARED
                task, (kind, size) = names[at % len(names)], ATTACKS[at % len(ATTACKS)]
                attack = Attack(kind, task, at % len(suite.classes[task]), size, seed=at)
                source = poison(suite, attack, training).suite
            others = [name for name in names if attack is None or name != attack.task]
            drawn = draw.sample(others, EXPERTS - poisoned) + ([attack.task] if attack else [])
            experts = {name: source.expert(name) for name in names if name in drawn}
            method, parameters = MERGES[number % len(MERGES)]
            started = time.perf_counter()
            found = audit_models(
                ModelSet(source.backbone(), source.base, experts),
                [source.task(name) for name in experts],
                lambda some, method=method, base=source.base, parameters=parameters: Merged(method, base, some, parameters),
                method,
                Probing(seed=number),
            )
            gains = {probe.task: probe.gain for probe in found.probes}
            score, first, _ = max(found.charges, key=lambda one: one[0])  # of a suite's tasks all can be probed
            seconds = time.perf_counter() - started
            yield Audited(attack, gains, score, first, found.suspects, seconds), f"{method} of {', '.join(experts)}"


def auroc(honest: list[float], poisoned: list[float]) -> float:
    """How often a poisoned merge's score is above an honest one's; ties count half."""
    wins = [(p > h) + (p == h) / 2 for p in poisoned for h in honest]
    return sum(wins) / len(wins)


def main() -> None:
    """Print each audit as it is done, and the panel's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="mini")
    parser.add_argument("--merges", type=int, default=20, help="honest ones, and as many poisoned")
    parser.add_argument("--steps", type=int, default=300, help="of training a poisoned expert")
    parser.add_argument("--out", type=Path, default=Path("runs/audit_panel/records.jsonl"))
    given = parser.parse_args()
    suite, done = open_suite(given.suite), list[Audited]()

    def write(task: str, metric: str, value: float, low: float, high: float, n: int, notes: str) -> None:
        record.append(given.out, [Record(given.suite, "audit", task, metric, value, low, high, n, split="adapt", notes=notes)])

    for one, said in panel(suite, given.merges, given.steps):
        what = "honest" if one.attack is None else f"{one.attack.kind} {one.attack.size} px on {one.attack.task}"
        for name, gain in one.gains.items():
            write(name, "patch_gain", *gain, 1, f"{what}; {said}")
        write("mean", "charge", one.score, one.score, one.score, 1, f"{what}; {said}; most against {one.first}")
        done.append(one)
        suspects = ", ".join(one.suspects) or "–"
        print(f"{what:36} {one.score:6.2f} {one.first:14} suspects: {suspects:24} {one.seconds:5.0f} s", flush=True)
    honest = [one for one in done if one.attack is None]
    poisoned = [one for one in done if one.attack is not None]
    area = auroc([one.score for one in honest], [one.score for one in poisoned])
    print(f"AUROC {area:.3f}")
    shares = {
        "false_flags": [bool(one.suspects) for one in honest],
        "found": [bool(one.attack and one.attack.task in one.suspects) for one in poisoned],
        "named_first": [bool(one.attack and one.first == one.attack.task) for one in poisoned],
    }
    write("mean", "auroc", area, area, area, len(done), "")
    for metric, hits in shares.items():
        found = share(torch.tensor(hits))
        write("mean", metric, found.value, found.low, found.high, found.n, "")
        print(f"{metric} {sum(hits)} of {found.n} [{100 * found.low:.0f}, {100 * found.high:.0f}] %")


if __name__ == "__main__":
    main()
