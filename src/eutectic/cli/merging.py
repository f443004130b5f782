"""Commands that merge, and that look at weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eutectic.cli._app import CompatOption, MemoryOption, RecipeFile, app, bar, open_recipe

if TYPE_CHECKING:
    from eutectic.merge.adapters import Fused
    from eutectic.merge.compose import Composed
    from eutectic.merge.view import Merged


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

    parsed, merged = open_recipe(recipe, compat)
    if len(merged.experts) == 1:
        print(f"note: one expert only; {merged.method} scales or copies it", file=sys.stderr)
    with bar() as progress:
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
    with bar() as progress:
        found = extracted(start, end, rank=rank, energy=energy, fan_in_fan_out=fan_in_fan_out, progress=progress)
    named = os.path.relpath(base.resolve(), out.resolve())
    save_extracted(found, start, end, out, base_name=named, fan_in_fan_out=fan_in_fan_out, replace=force)
    for at, error in found.errors.items():
        print(f"rank {at:5}  leaves out {100 * error:6.2f} % of the matrices' change")
    print(f"{out}: {len(found.ranks)} matrices; other tensors, which it has not, hold {100 * found.rest:.2g} % of ‖Δ‖²")


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

    _, merged = open_recipe(recipe, compat)
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
