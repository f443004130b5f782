"""What the commands share: the application, options, recipes, a progress bar, how a score is shown."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eutectic.errors import EutecticError

if TYPE_CHECKING:
    from rich.console import Console

    from eutectic.merge.adapters import Fused
    from eutectic.merge.compose import Composed
    from eutectic.merge.recipe import AnyRecipe
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


def open_recipe(path: Path, compat: Compat | None = None) -> tuple[AnyRecipe, Merged | Composed | Fused]:
    """A recipe in either schema, and what it merges, with nothing read but headers."""
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


def terminal() -> Console:
    """Where tables are printed."""
    from rich.console import Console

    console = Console()
    # a pipe has no width of its own, and 80 columns would fold the names
    return console if console.is_terminal else Console(width=150)


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, as what long calls tell their progress to."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    from rich.console import Console

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(job, description=what, completed=done, total=total)


def print_score(what: str, found: Record) -> None:
    """One score as a line."""
    print(f"{what:16} {100 * found.value:5.1f}  [{100 * found.low:.1f}, {100 * found.high:.1f}]  n = {found.n}")
