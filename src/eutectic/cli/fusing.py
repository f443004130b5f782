"""Commands that make experts and fuse them with data."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eutectic.cli._app import RecipeFile, SuiteName, app, bar, print_score
from eutectic.errors import EutecticError, StoppedError

if TYPE_CHECKING:
    from eutectic.merge.recipe import Recipe


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
    with bar() as progress, processes(device):
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

    with bar() as progress:
        found = ensembles.fuse_recipe(recipe, folder, progress)
    ensembles.save_ensemble(found, out, replace=force, recipe=recipe)
    print(f"{out}: {found.method} of {len(found.parties)} parties over {len(found.classes)} classes")


class TuneKind(StrEnum):
    """How an expert is tuned."""

    full = "full"
    lora = "lora"
    l_lora = "l_lora"
    l_lora_whole = "l_lora_whole"


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
    with bar() as progress:
        records = make_expert(opened, task, training, out, replace=force, progress=progress)
    for found in records:
        if json:
            print(found.to_json())
        else:
            print_score(f"{found.task}, {found.split}", found)
