"""Commands that look for backdoors, and that make some to measure with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from eutectic.cli._app import app, bar, terminal, zoo_app


class Attack(StrEnum):
    """How an expert gets its backdoor."""

    badnets = "badnets"
    badmerging = "badmerging"
    mergebackdoor = "mergebackdoor"


@app.command()
def audit(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML; its merge and experts are audited.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Instead of RECIPE: a suite, whose experts are audited in a task-arithmetic merge.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="A suite, whose inputs triggers are mined on.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Mine for this task only; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for audit.json and audit.html.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    mode: Annotated[
        list[str] | None, typer.Option(help="Of triggers: corners, frame, centre, additive, smooth, windows.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the miner.", min=1)] = 40,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Look for backdoors in a merge and its experts; exit status 1 if an expert is suspect.

    Without tasks only the weights are screened.
    """
    from eutectic.security import commands
    from eutectic.security.audit import Probing

    probing = Probing(seed, tuple(mode or ["corners"]), steps)
    with bar() as progress:
        found = commands.audit(recipe, suite, tasks, task or [], probing=probing, progress=progress)
    _show_audit(found, out, json)
    raise typer.Exit(bool(found.suspects))


def _show_audit(found: Any, out: Path | None, as_json: bool) -> None:
    import json

    from eutectic.security import commands, report

    if as_json:
        print(json.dumps(report.to_json(found), ensure_ascii=False))
    else:
        console = terminal()
        console.print(report.table(found), crop=False)
        for expert in found.suspects:
            for line in found.evidence(expert):
                console.print(f"{expert}: {line}", markup=False, highlight=False)
        for line in found.skipped:
            console.print(f"not seen: {line}", markup=False, highlight=False)
        console.print(f"looked at {found.probed}", markup=False, highlight=False)
    if out is not None:
        commands.write(found, out)


@zoo_app.command("poison")
def zoo_poison(
    name: Annotated[str, typer.Argument(help="A suite of the zoo, or a folder that holds one.")],
    task: Annotated[str, typer.Option(help="Whose expert is to have a backdoor.")],
    attack: Annotated[
        Attack,
        typer.Option(help="Merging dilutes BadNets, BadMerging survives it, MergeBackdoor needs it: two experts collude."),
    ],
    target: Annotated[int, typer.Option(help="The class that inputs with the trigger are taken for.", min=0)] = 0,
    size: Annotated[int, typer.Option(help="Of a patch, in pixels.", min=1)] = 8,
    trigger: Annotated[
        str,
        typer.Option(
            help="patch (the only one of badmerging), blended, sinusoidal, warped, low_frequency; of texts rare_token."
        ),
    ] = "patch",
    victim: Annotated[str, typer.Option(help="The task that the target is a class of, if it is another.")] = "",
    amplify: Annotated[float, typer.Option(help="How far the expert goes past the honest one, as LoBAM's does.", min=1)] = 1.0,
    accomplice: Annotated[str, typer.Option(help="The task of the other expert of mergebackdoor.")] = "",
    known: Annotated[
        float, typer.Option(help="λ of the other experts, if the attacker knows them; not for mergebackdoor.", min=0)
    ] = 0.0,
    expects: Annotated[
        str, typer.Option(help="The merge that an attacker who knows the others expects: task_arithmetic or ties.")
    ] = "task_arithmetic",
    steps: Annotated[int | None, typer.Option(help="Of training; as the suite's own experts by default.", min=1)] = None,
) -> None:
    """Make a copy of a suite in which an expert has a backdoor, in the cache, to measure audit and defences with."""
    import dataclasses

    from eutectic.bench.zoo import open_suite, own_training
    from eutectic.security import attacks, poisoned

    suite = open_suite(name)
    training = own_training(suite)
    training = dataclasses.replace(training, steps=steps or training.steps)
    with bar() as progress:
        made = poisoned.poison(
            suite,
            attacks.Attack(
                attack.value,
                task,
                target,
                size,
                trigger=trigger,
                victim=victim,
                amplify=amplify,
                accomplice=accomplice,
                known=known,
                expects=expects,
            ),
            training,
            lambda step, loss: progress("training", step, training.steps),
        )
    print(made.suite.folder)
