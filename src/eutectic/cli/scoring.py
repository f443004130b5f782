"""Commands that score, and that show scores."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eutectic.cli._app import Protocol, SuiteName, app, print_score, terminal
from eutectic.errors import EutecticError

if TYPE_CHECKING:
    from eutectic.bench.evaluate import Choice
    from eutectic.record import Record


@app.command(name="eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    suite: SuiteName = "mini",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line.")] = False,
    split: Annotated[str, typer.Option(help="Which split to score.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Of an ensemble: score it on this .npz, and no suite.")] = None,
    routing: Annotated[
        Path | None,
        typer.Option(help="Of a mixture: write which experts each task uses here, as an SVG, and as JSON beside it."),
    ] = None,
) -> None:
    """Score MODEL on the tasks of a suite."""
    from eutectic.bench import evaluate as scoring
    from eutectic.bench.tuned import loaded
    from eutectic.bench.zoo import open_suite
    from eutectic.checkpoint.hashed import fingerprint

    if data is not None:
        from eutectic.bench.loading import score_ensemble

        _print_scores(score_ensemble(model, data, split), json)
        return
    opened = open_suite(suite)
    network, weights = loaded(opened, model)
    if routing is not None:
        _report_routing(network, opened, split, routing)
    fields = scoring.fields_of(model) | {"suite": opened.name, "inputs": {"model": fingerprint(weights)}}
    records = scoring.evaluate(network, opened.tasks, split=split, **fields)
    _print_scores(records, json)


def _print_scores(records: list[Record], json: bool) -> None:
    from eutectic import record

    if json:
        for found in records:
            print(found.to_json())
    else:
        for found in [*records, record.mean_of(records)]:
            print_score(found.task, found)


def _report_routing(network: Any, suite: Any, split: str, path: Path) -> None:
    import json

    from eutectic.bench.routing import heat_map
    from eutectic.bench.routing import routing as routing_of
    from eutectic.checkpoint.writer import explained

    found = routing_of(network, suite.tasks, split)
    names = list(suite.classes) if found.mean.shape[2] == len(suite.classes) else [str(i) for i in range(found.mean.shape[2])]
    with explained(path):
        path.write_text(heat_map(found, names), encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where records and report go.")] = Path("runs/demo"),
    all_: Annotated[bool, typer.Option("--all", help="Every method, however long it takes.")] = False,
    safety: Annotated[
        bool, typer.Option("--safety", help="Instead: hide a poisoned expert among them, audit the merge, and defend it.")
    ] = False,
) -> None:
    """Fuse the eight experts of the embedded suite by several methods, score them all, and write a report."""
    from eutectic.bench.evaluate import REPRESENTATIVE

    if safety:
        from eutectic.security import demo as safety_demo

        safety_demo.run(out.with_name("safety") if out == Path("runs/demo") else out, print)
        return
    _scored("mini", out, None if all_ else REPRESENTATIVE)


class Study(StrEnum):
    """What is asked of fused networks and task vectors beside a score on all tasks."""

    generalisation = "generalisation"
    robustness = "robustness"
    pareto = "pareto"
    tuning = "tuning"
    vectors = "vectors"


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="A suite of the zoo, or a folder that holds one.")],
    out: Annotated[Path | None, typer.Option(help="Where records and report go; runs/SUITE by default.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method, as ties or 'ties {density: 0.3}'; may be repeated.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of methods that are fitted; may be given several times.", min=0)
    ] = None,
    protocol: Annotated[
        list[Protocol] | None, typer.Option(help="What fitted methods see: adapt's inputs, or test's. May be given twice.")
    ] = None,
    study: Annotated[
        Study | None,
        typer.Option(
            help="generalisation: fuse without two tasks and score those too; robustness: score on corrupted images; pareto: "
            "draw fronts; tuning: merge 2 to all experts of several kinds; vectors: cosines and disentanglement errors."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="For pareto: tasks of the front, two or more. For robustness and tuning: all by default. For vectors: the two."
        ),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            help="For tuning: where experts lie, or are made, as KIND/TASK; OUT/experts by default. For vectors: as TASK."
        ),
    ] = None,
    corruption: Annotated[list[str] | None, typer.Option(help="For robustness; all seven by default.")] = None,
    severity: Annotated[list[int] | None, typer.Option(help="For robustness, 1 to 5; 3 by default.")] = None,
) -> None:
    """Score θ₀, the experts and every closed-form method, or the methods named, on a suite."""
    from eutectic import record
    from eutectic.bench import corruptions, fronts, growing, protocols
    from eutectic.bench.evaluate import run_suite

    seen: Any = [p.value for p in protocol or [Protocol.inductive]]
    out = out or Path("runs") / Path(suite).name
    if task and study not in (Study.pareto, Study.robustness, Study.tuning, Study.vectors):
        raise EutecticError("--task is for --study pareto, robustness, tuning and vectors")
    if experts and study not in (Study.tuning, Study.vectors):
        raise EutecticError("--experts is for --study tuning and vectors")
    if study is not Study.robustness and (corruption or severity):
        raise EutecticError("--corruption and --severity are for --study robustness")
    if study is Study.vectors:
        _vectors(suite, out, task or [], experts)
        return
    if study is None:
        _scored(suite, out, method, functools.partial(run_suite, seeds=seed or [0], protocols=seen))
        return
    if len(seed or []) > 1 or len(seen) > 1:
        raise EutecticError(f"a study of {study.value} takes one seed and one protocol at a time")
    how: dict[str, Any] = {"seed": (seed or [0])[0], "protocol": seen[0]}
    match study:
        case Study.generalisation:
            _scored(suite, out, method, functools.partial(protocols.generalisation, **how))
        case Study.robustness:
            how |= {"kinds": corruption or list(corruptions.KINDS), "severities": severity or [3], "tasks": task}
            _scored(suite, out, method, functools.partial(protocols.robustness, **how))
        case Study.pareto:
            drawn = fronts.figure() if len(task or []) in fronts.PANELS else None
            _scored(suite, out, method or ["pwe_moe"], functools.partial(fronts.pareto, tasks=task or [], **how))
            if drawn:
                fronts.plot(list(record.load(out / "records.jsonl")), out / "fronts.svg", drawn)
        case Study.tuning:
            drawn = fronts.figure()
            how |= {"experts": experts or out / "experts", "tasks": task or []}
            _scored(suite, out, method or list(growing.METHODS), functools.partial(growing.growing, **how))
            growing.plot(list(record.load(out / "records.jsonl")), out / "tuning.svg", drawn)


def _vectors(suite: str, out: Path, pair: list[str], experts: Path | None) -> None:
    from eutectic import record
    from eutectic.bench import fronts, vectors
    from eutectic.bench.tuned import with_experts
    from eutectic.bench.zoo import open_suite
    from eutectic.checkpoint.writer import explained

    opened, drawn = open_suite(suite), fronts.figure()
    if experts is not None:
        opened = with_experts(opened, experts)
    told = functools.partial(print, file=sys.stderr, flush=True)
    records = list(vectors.vectors(opened, [pair] if pair else [], progress=told))
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "vectors.jsonl").unlink(missing_ok=True)
        record.append(out / "vectors.jsonl", records)
        vectors.plot(records, out / "vectors.svg", drawn)
    print("\n".join(vectors.summary(records)))
    print(f"records: {out / 'vectors.jsonl'}\nplot:    {out / 'vectors.svg'}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A folder with records.jsonl, or such a file.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Show the records of a run as a table; given its folder, also write its report.html again."""
    from eutectic import record
    from eutectic.bench import report as reporting

    path = run / "records.jsonl" if run.is_dir() else run
    if not path.exists():
        raise EutecticError(f"{path}: no such records; `eutectic demo` or `eutectic bench SUITE` makes some")
    records = list(record.load(path))
    if markdown:
        print(reporting.markdown(records))
    else:
        _show(records)
        if run.is_dir():
            title = ", ".join(dict.fromkeys(record.suite for record in records))
            (run / "report.html").write_text(reporting.html(records, title=title), encoding="utf-8")


def _scored(suite: str, out: Path, only: Sequence[str] | None, score: Callable[..., Iterator[Record]] | None = None) -> None:
    from rich.console import Console

    from eutectic import record
    from eutectic.bench import evaluate as scoring
    from eutectic.bench import report as reporting
    from eutectic.bench.zoo import open_suite
    from eutectic.checkpoint.writer import explained

    opened = open_suite(suite)
    chosen = [_choice(said) for said in only or scoring.applicable(opened)]
    path = out / "records.jsonl"
    partial = path.with_suffix(".partial")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
    records = []
    console = Console(stderr=True)
    with console.status("starting") as status:
        progress = status.update if console.is_terminal else lambda line: print(line, file=sys.stderr, flush=True)
        for found in (score or scoring.run_suite)(opened, chosen, progress=progress):
            record.append(partial, [found])
            records.append(found)
    partial.replace(path)
    _show(records)
    html = out / "report.html"
    html.write_text(reporting.html(records, title=f"{opened.name}: {len(chosen)} ways to fuse its experts"), encoding="utf-8")
    print(f"records: {path}\nreport:  {html}")


def _choice(said: str) -> Choice:
    """A method's name, or one with parameters: ``adamerging {per: task}``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from eutectic.bench.evaluate import Choice

    name, _, rest = said.partition(" ")
    try:
        given = YAML(typ="safe", pure=True).load(rest) if rest.strip() else {}
    except YAMLError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise EutecticError(f"--method {said!r}: write a method's name, or one with parameters, as 'ties {{density: 0.3}}'")
    return Choice(name, given)


def _show(records: list[Record]) -> None:
    from eutectic.bench import report as reporting

    console = terminal()
    for setting, those in reporting.settings(records).items():
        if setting:
            console.print(setting, markup=False, highlight=False)
        console.print(reporting.table(those), crop=False)
