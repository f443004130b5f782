"""The command line: each command is a few lines over the API.

Exit status: 0 done, 1 ``diff`` found a difference or ``audit`` a suspect, or a bug struck, 2 the input was refused (one
message, nothing left behind).
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eutectic.errors import EutecticError, StoppedError

if TYPE_CHECKING:
    from eutectic.bench.evaluate import Choice
    from eutectic.merge.adapters import Fused
    from eutectic.merge.compose import Composed
    from eutectic.merge.recipe import AnyRecipe, Recipe
    from eutectic.merge.view import Merged
    from eutectic.record import Record

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
zoo_app = typer.Typer(no_args_is_help=True, help="Suites of real experts: build them, list them.")
app.add_typer(zoo_app, name="zoo")

RecipeFile = Annotated[Path, typer.Argument(help="A recipe in YAML.", metavar="RECIPE")]


class Compat(StrEnum):
    """Whose conventions a recipe is read with."""

    mergekit = "mergekit"


class Protocol(StrEnum):
    """Which inputs a method that is fitted sees."""

    inductive = "inductive"
    transductive = "transductive"


class TuneKind(StrEnum):
    """How an expert is tuned."""

    full = "full"
    lora = "lora"
    l_lora = "l_lora"
    l_lora_whole = "l_lora_whole"


class Study(StrEnum):
    """What is asked of fused networks and task vectors beside a score on all tasks."""

    generalisation = "generalisation"
    robustness = "robustness"
    pareto = "pareto"
    tuning = "tuning"
    vectors = "vectors"


class Attack(StrEnum):
    """How an expert gets its backdoor."""

    badnets = "badnets"
    badmerging = "badmerging"


CompatOption = Annotated[
    Compat | None,
    typer.Option("--compat", help="Read a recipe in mergekit's schema with mergekit's conventions, not the papers'."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", help="What the process may take, like 2GiB; 1.5 GiB, or more for a large tensor, if left out."),
]
SuiteName = Annotated[str, typer.Option("--suite", help="A suite of the zoo, or a folder that holds one.")]


def main() -> None:
    """Run the command line; errors that Eutectic raises on purpose become one message and exit status 2."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what is half-done is tidied up
    try:
        app()
    except EutecticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def merge(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is an existing folder.")] = False,
    compat: CompatOption = None,
    memory: MemoryOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Take NaN and Inf of inputs from the base, and count them.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="ADDRESS",
            help="Let a Ray cluster do the work: HOST:PORT, or auto for the one that this machine belongs to. "
            "Inputs and OUT lie on a disk that its machines share; --memory is for each of their processes.",
        ),
    ] = None,
) -> None:
    """Merge checkpoints as RECIPE says and write a Hugging Face folder OUT, whole or not at all."""
    from eutectic.merge import run
    from eutectic.merge.compose import Composed
    from eutectic.merge.plan import bytes_of

    parsed, merged = _open_recipe(recipe, compat)
    if len(merged.experts) == 1:
        print(f"note: one expert only; {merged.method} scales or copies it", file=sys.stderr)
    with _bar() as progress:
        limit = bytes_of(memory) if memory else None
        run.save(
            merged, out, replace=force, recipe=parsed, memory_bytes=limit, repair=repair, cluster=cluster, progress=progress
        )
    for note in merged.mixture.found if isinstance(merged, Composed) and merged.mixture else ():
        print(f"note: {note}", file=sys.stderr)
    print(f"{out}: {merged.method} of {len(merged.experts)} expert(s){_truncation(merged)}")


def _truncation(merged: Merged | Composed | Fused) -> str:
    from eutectic.merge.adapters import Fused

    if not isinstance(merged, Fused):
        return ""
    ranks = sorted({merged.rank_of(name) for name in merged.targets})
    said = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"; rank {said}, which leaves out {100 * merged.error:.2g} % of the merged change"


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="What EXPERT was fine-tuned from.")],
    expert: Annotated[Path, typer.Argument(help="A full fine-tune.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    rank: Annotated[int | None, typer.Option(help="Of every matrix, at most.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="So many directions of each matrix as hold this share of its change, as a square.")
    ] = None,
    fan_in_fan_out: Annotated[bool, typer.Option("--fan-in-fan-out", help="Weights lie as GPT-2's do, inputs first.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is an existing folder.")] = False,
) -> None:
    """Write what EXPERT changed in BASE as a LoRA adapter, a PEFT folder, and say what each rank leaves out."""
    import os

    from eutectic.checkpoint.folder import open_path
    from eutectic.merge.extract import extract as extracted
    from eutectic.merge.extract import save_extracted

    start, end = open_path(base), open_path(expert)
    with _bar() as progress:
        found = extracted(start, end, rank=rank, energy=energy, fan_in_fan_out=fan_in_fan_out, progress=progress)
    named = os.path.relpath(base.resolve(), out.resolve())
    save_extracted(found, start, end, out, base_name=named, fan_in_fan_out=fan_in_fan_out, replace=force)
    for at, error in found.errors.items():
        print(f"rank {at:5}  leaves out {100 * error:6.2f} % of the matrices' change")
    print(f"{out}: {len(found.ranks)} matrices; other tensors, which it has not, hold {100 * found.rest:.2g} % of ‖Δ‖²")


@app.command()
def fuse(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is an existing folder.")] = False,
    device: Annotated[str, typer.Option(help="Where the network runs: cpu, cuda, cuda:1 …")] = "cpu",
    autocast: Annotated[bool, typer.Option("--bf16", help="Run the network in bfloat16.")] = False,
) -> None:
    """Fit RECIPE's method to unlabelled inputs and write a Hugging Face folder OUT, with the artefact of the fit in it.

    A rule that combines predictions writes its parties instead, and what it learned.  Another fit that was stopped is carried
    on by the same command.  Under torchrun its processes share each batch.
    """
    import shutil

    import torch

    from eutectic.bench import fusing
    from eutectic.fusion import _api as fusion
    from eutectic.fusion._fit import processes, rank
    from eutectic.fusion._fusion import Run
    from eutectic.merge import run
    from eutectic.merge.recipe import Recipe, load

    parsed = load(recipe)
    if not isinstance(parsed, Recipe):
        raise EutecticError(f"{recipe}: is in mergekit's schema, which has no methods that are fitted: use `eutectic merge`")
    if parsed.is_ensemble:
        _fuse_parties(parsed, recipe.parent, out, force)
        return
    if out.exists() and not force:
        raise EutecticError(f"{out}: exists already. Choose another path, or pass --force.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EutecticError(f"--device {device}: {str(error).splitlines()[0]}") from None
    begun = out.resolve().with_name(f".{out.resolve().name}.fit")
    with _bar() as progress, processes(device):
        how = Run(parsed.seed, parsed.protocol, device, autocast, begun, progress)
        try:
            artefact = fusing.fit_recipe(parsed, recipe.parent, how)
        except StoppedError as error:
            if error.artefact is not None and not rank():
                kept = out.with_name(f"{out.name}.stopped")
                fusion.save_artefact(error.artefact, kept, replace=True)
                raise StoppedError(f"{error}; the last good artefact is in {kept}") from None
            raise
        if rank():
            return
        parsed, merged = fusing.applied(parsed, recipe.parent, artefact)

        def attach(folder: Path) -> None:
            (folder / "artefact").mkdir()
            fusion.write_artefact(artefact, folder / "artefact")

        run.save(merged, out, replace=force, recipe=parsed, progress=progress, attach=attach)
    shutil.rmtree(begun, ignore_errors=True)
    print(f"{out}: {merged.method} of {len(merged.experts)} expert(s)")


def _fuse_parties(recipe: Recipe, folder: Path, out: Path, force: bool) -> None:
    from eutectic.ensemble import _api as ensembles

    with _bar() as progress:
        found = ensembles.fuse_recipe(recipe, folder, progress)
    ensembles.save_ensemble(found, out, replace=force, recipe=recipe)
    print(f"{out}: {found.method} of {len(found.parties)} parties over {len(found.classes)} classes")


@app.command()
def plan(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="Where the merge would be written, for the room on that disk.")] = Path(),
    compat: CompatOption = None,
    memory: MemoryOption = None,
) -> None:
    """Say what merging RECIPE would read, write and need, from headers alone."""
    from eutectic.checkpoint.writer import free_bytes
    from eutectic.merge.plan import bytes_of
    from eutectic.merge.plan import plan as make_plan

    _, merged = _open_recipe(recipe, compat)
    planned = make_plan(merged, bytes_of(memory) if memory else None)
    print(f"method          {merged.method} {merged.parameters}")
    print(f"experts         {', '.join(merged.experts)}")
    print(f"tensors         {planned.tensors}, of them merged {planned.merged_tensors}; {planned.parameters:,} parameters")
    print(f"passes          {planned.passes}")
    for what, nbytes, more in (
        ("read", planned.read_bytes, ""),
        ("write", planned.write_bytes, f", {free_bytes(out) / 2**20:,.1f} MiB are free"),
        ("peak memory", planned.peak_bytes, f" at most; {planned.largest} takes most"),
    ):
        print(f"{what:15} {nbytes / 2**20:,.1f} MiB{more}")


@app.command()
def verify(out: Annotated[Path, typer.Argument(help="A folder that Eutectic wrote.")]) -> None:
    """Hash the tensors of OUT again and compare them with its provenance; exit status 1 if one differs."""
    from eutectic.merge import run

    lines = run.verify(out)
    print("\n".join(lines) if lines else f"{out}: every tensor is as it was written")
    raise typer.Exit(bool(lines))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None) -> None:
    """List the merge methods, or explain one: equation, parameters with their ranges, source."""
    import inspect

    from eutectic import registry

    if name is not None:
        from eutectic.methods._method import signature_model

        function = registry.get(registry.room_of(name), name)
        print(f"{name}{inspect.signature(function)}\n\n{inspect.getdoc(function)}\n")
        for key, field in signature_model(name).model_json_schema()["properties"].items():
            print(f"  {key}: {', '.join(f'{k} {v}' for k, v in field.items() if k != 'title')}")
        return
    for room in registry.ROOMS:
        for known in registry.names(room):
            print(f"{known:24} {(inspect.getdoc(registry.get(room, known)) or '').splitlines()[0]}")


@app.command()
def diff(left: str, right: str) -> None:
    """Compare two checkpoints tensor by tensor; exit status 1 if they differ."""
    from eutectic.merge.api import diff as compare

    lines = compare(left, right)
    print("\n".join(lines) if lines else "no difference")
    raise typer.Exit(bool(lines))


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
            _print_score(found.task, found)


def _print_score(what: str, found: Record) -> None:
    print(f"{what:16} {100 * found.value:5.1f}  [{100 * found.low:.1f}, {100 * found.high:.1f}]  n = {found.n}")


@app.command()
def tune(
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    task: Annotated[str, typer.Option(help="A task of the suite.")],
    kind: Annotated[
        TuneKind, typer.Option(help="All weights; LoRA; linearised LoRA, layer by layer, or as one tangent of the network.")
    ] = TuneKind.lora,
    suite: SuiteName = "mini",
    steps: Annotated[int | None, typer.Option(help="Of AdamW; as the suite's own experts by default.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate; one that fits the kind by default.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of adapters.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Adapters are scaled by alpha / rank.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / √rank.")] = False,
    seed: Annotated[int, typer.Option(help="Fixes the result; adapters of one seed share A.", min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is an existing folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line.")] = False,
) -> None:
    """Make an expert of a suite's task, whole or not at all: a Hugging Face folder, or a PEFT folder of an adapter."""
    from eutectic.bench.tuned import make_expert, training_for
    from eutectic.bench.zoo import open_suite

    opened = open_suite(suite)
    training = training_for(opened, kind.value, steps=steps, lr=lr, rank=rank, alpha=alpha, rslora=rslora, seed=seed)
    with _bar() as progress:
        records = make_expert(opened, task, training, out, replace=force, progress=progress)
    for found in records:
        if json:
            print(found.to_json())
        else:
            _print_score(f"{found.task}, {found.split}", found)


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
    _run("mini", out, None if all_ else REPRESENTATIVE)


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
        typer.Option(help="For pareto: a task of the front; two or more. For tuning: all by default. For vectors: the two."),
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
    if task and study not in (Study.pareto, Study.tuning, Study.vectors):
        raise EutecticError("--task is for --study pareto, tuning and vectors")
    if experts and study not in (Study.tuning, Study.vectors):
        raise EutecticError("--experts is for --study tuning and vectors")
    if study is not Study.robustness and (corruption or severity):
        raise EutecticError("--corruption and --severity are for --study robustness")
    if study is Study.vectors:
        _vectors(suite, out, task or [], experts)
        return
    if study is None:
        _run(suite, out, method, functools.partial(run_suite, seeds=seed or [0], protocols=seen))
        return
    if len(seed or []) > 1 or len(seen) > 1:
        raise EutecticError(f"a study of {study.value} takes one seed and one protocol at a time")
    how: dict[str, Any] = {"seed": (seed or [0])[0], "protocol": seen[0]}
    match study:
        case Study.generalisation:
            _run(suite, out, method, functools.partial(protocols.generalisation, **how))
        case Study.robustness:
            how |= {"kinds": corruption or list(corruptions.KINDS), "severities": severity or [3]}
            _run(suite, out, method, functools.partial(protocols.robustness, **how))
        case Study.pareto:
            drawn = fronts.figure() if len(task or []) in fronts.PANELS else None
            _run(suite, out, method or ["pwe_moe"], functools.partial(fronts.pareto, tasks=task or [], **how))
            if drawn:
                fronts.plot(list(record.load(out / "records.jsonl")), out / "fronts.svg", drawn)
        case Study.tuning:
            drawn = fronts.figure()
            how |= {"experts": experts or out / "experts", "tasks": task or []}
            _run(suite, out, method or list(growing.METHODS), functools.partial(growing.growing, **how))
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
def audit(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML; its merge and experts are audited.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Instead of RECIPE: a suite, whose experts are audited in a task-arithmetic merge.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="A suite, whose inputs triggers are mined on.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Mine for this task only; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for audit.json and audit.html.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    mode: Annotated[list[str] | None, typer.Option(help="Of triggers: corners, frame, centre, additive, smooth.")] = None,
    steps: Annotated[int, typer.Option(help="Of the miner.", min=1)] = 40,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Look for backdoors in a merge and its experts; exit status 1 if an expert is suspect.

    Without tasks only the weights are screened.
    """
    from eutectic.security import commands
    from eutectic.security.audit import Probing

    probing = Probing(seed, tuple(mode or ["corners"]), steps)
    with _bar() as progress:
        found = commands.audit(recipe, suite, tasks, task or [], probing=probing, progress=progress)
    _show_audit(found, out, json)
    raise typer.Exit(bool(found.suspects))


def _show_audit(found: Any, out: Path | None, as_json: bool) -> None:
    import json

    from rich.console import Console

    from eutectic.security import commands, report

    if as_json:
        print(json.dumps(report.to_json(found), ensure_ascii=False))
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=150)
        console.print(report.table(found), crop=False)
        for expert in found.suspects:
            for line in found.evidence(expert):
                console.print(f"{expert}: {line}", markup=False, highlight=False)
        for line in found.skipped:
            console.print(f"not seen: {line}", markup=False, highlight=False)
        console.print(f"looked at {found.probed}", markup=False, highlight=False)
    if out is not None:
        commands.write(found, out)


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
            (run / "report.html").write_text(reporting.html(records, title=f"{records[0].suite}"), encoding="utf-8")


@zoo_app.command("list")
def zoo_list() -> None:
    """List the suites, and where each lies or would lie."""
    from eutectic.bench import zoo

    for name, spec in zoo.SPECS.items():
        folder = zoo.find(name)
        state = "built" if (folder / "suite.json").exists() else "not built"
        print(f"{name:8} {spec.kind:8} {len(spec.tasks)} tasks  {state:10} {folder}")


@zoo_app.command("poison")
def zoo_poison(
    name: Annotated[str, typer.Argument(help="A suite of the zoo, or a folder that holds one.")],
    task: Annotated[str, typer.Option(help="Whose expert is to have a backdoor.")],
    attack: Annotated[Attack, typer.Option(help="BadNets is diluted by merging, BadMerging is made to survive it.")],
    target: Annotated[int, typer.Option(help="The class that inputs with the trigger are taken for.", min=0)] = 0,
    size: Annotated[int, typer.Option(help="Of the trigger, in pixels.", min=1)] = 8,
    steps: Annotated[int | None, typer.Option(help="Of training; as the suite's own experts by default.", min=1)] = None,
) -> None:
    """Make a copy of a suite in which one expert has a backdoor, in the cache, to measure audit and defences with."""
    import dataclasses

    from eutectic.bench.zoo import open_suite
    from eutectic.security import attacks, poisoned

    suite = open_suite(name)
    training = poisoned.training_of(suite)
    training = dataclasses.replace(training, steps=steps or training.steps)
    with _bar() as progress:
        made = poisoned.poison(
            suite,
            attacks.Attack(attack.value, task, target, size),
            training,
            lambda step, loss: progress("training", step, training.steps),
        )
    print(made.suite.folder)


@zoo_app.command("build")
def zoo_build(
    name: Annotated[str, typer.Argument(help="mini, dino or text.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the raw data sets; mini has its own.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model; from the hub by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to build; the cache by default.")] = None,
) -> None:
    """Train the experts of a suite; a build that was stopped carries on."""
    from eutectic.bench import zoo

    spec = zoo.spec_of(name)
    target = out or zoo.cache() / "zoo" / name
    with _bar() as progress:
        zoo.build(spec, target, data, base, progress)
    print(f"{target}: {len(spec.tasks)} experts")


def _open_recipe(path: Path, compat: Compat | None = None) -> tuple[AnyRecipe, Merged | Composed | Fused]:
    from eutectic.bench import fusing
    from eutectic.bench.evaluate import suite_recipe
    from eutectic.merge.recipe import Recipe, load
    from eutectic.merge.run import merged_from
    from eutectic.merge.view import Merged

    recipe = load(path, compat is not None)
    if isinstance(recipe, Recipe) and recipe.is_fitted:
        recipe, merged = fusing.applied(recipe, path.parent)
    elif isinstance(recipe, Recipe) and recipe.suite:
        merged = suite_recipe(recipe)
    else:
        merged = merged_from(recipe, path.parent)
    if not isinstance(merged, Merged):
        for note in merged.notes:
            print(f"note: {note}", file=sys.stderr)
    return recipe, merged


def _run(suite: str, out: Path, only: Sequence[str] | None, score: Callable[..., Iterator[Record]] | None = None) -> None:
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
    from rich.console import Console

    from eutectic.bench import report as reporting

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a pipe has no width of its own, and 80 columns would fold the names
    for setting, those in reporting.settings(records).items():
        if setting:
            console.print(setting, markup=False, highlight=False)
        console.print(reporting.table(those), crop=False)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    from rich.console import Console

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(job, description=what, completed=done, total=total)
