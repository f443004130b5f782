"""Commands about suites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eutectic.cli._app import bar, zoo_app


@zoo_app.command("list")
def zoo_list() -> None:
    """List the suites, and where each lies or would lie."""
    from eutectic.bench import zoo

    for name, spec in zoo.SPECS.items():
        folder = zoo.find(name)
        state = "built" if (folder / "suite.json").exists() else "not built"
        print(f"{name:8} {spec.kind:8} {len(spec.tasks)} tasks  {state:10} {folder}")


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
    with bar() as progress:
        zoo.build(spec, target, data, base, progress)
    print(f"{target}: {len(spec.tasks)} experts")
