"""Records as a terminal table, a Markdown table and one self-contained HTML page with pictures.

Everything here is a pure function of the records; names in them come from outside and are escaped.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from eutectic.errors import EutecticError
from eutectic.record import Record, mean_of

if TYPE_CHECKING:
    from rich.table import Table

MEAN, PRETRAINED, INDIVIDUAL = "mean", "pretrained", "individual"
FEW = 4  # so many tasks leave room for their intervals in 120 columns of text

# Okabe and Ito's colour-blind-safe palette; its black is the page's ink, and marks what is not a merge.
INK = "var(--ink)"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SHAPES = (
    "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",  # circle
    "m-3.2-3.2h6.4v6.4h-6.4z",  # square
    "m0-4.4 4.2 7.4h-8.4z",  # triangle
    "m0-4.8 4.2 4.8-4.2 4.8-4.2-4.8z",  # diamond
    "m-1.4-4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",  # cross
)
# SVG units of one panel: its width, a method's row, the space above and below the rows, and a letter's width.
WIDTH, ROW, TOP, BOTTOM, LETTER, LONGEST = 360, 14, 24, 20, 6.4, 26


@dataclasses.dataclass(frozen=True)
class Grid:
    """One metric's records by (method, task), duplicates and seeds resolved; methods and tasks in the order shown."""

    metric: str
    methods: list[str]
    tasks: list[str]
    cells: dict[tuple[str, str], Record]

    @property
    def is_fraction(self) -> bool:
        """Whether this is an accuracy in [0, 1]: shown in percent, compared with the experts, and drawn."""
        return _is_fraction(self.metric, self.cells.values())


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number as text, its half interval, whether it is the best merge's, and the whole story for a tooltip."""

    text: str = "–"
    half: str = ""
    best: bool = False
    story: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's row: a cell per task and the mean, then what it kept and cost."""

    method: str
    cells: list[Cell]
    tail: list[str]


def grids(records: Iterable[Record]) -> list[Grid]:
    """The records as one grid per metric, the first accuracy before all others.

    The last of two records with the same suite, method, task, metric and seed wins; several seeds are averaged.
    Raises EutecticError where there is nothing to report, or records of several suites or splits.
    """
    names = ("suite", "method", "task", "metric", "split")
    given = [_with_printable(record, names) for record in records]
    if not given:
        raise EutecticError("nothing to report: there are no records. Make some with `eutectic bench` or `eutectic demo`.")
    for name in ("suite", "split"):
        found = sorted({getattr(record, name) for record in given})
        if len(found) > 1:
            raise EutecticError(f"a report shows one {name}, but these records are of {', '.join(found)}: choose one.")
    last = {(record.metric, record.method, record.task, record.seed): record for record in given}
    by_metric: dict[str, list[Record]] = defaultdict(list)
    for record in last.values():
        by_metric[record.metric].append(record)
    return sorted((_grid(metric, those) for metric, those in by_metric.items()), key=lambda grid: not grid.is_fraction)


def settings(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records by what was asked of the methods, in order: "" for all tasks of a suite, else the study and the split.

    Where there are several suites, their names come first.  A method that saw the test's inputs is another method.
    """
    records, found = list(records), defaultdict[str, list[Record]](list)
    several = len({record.suite for record in records}) > 1
    for record in records:
        if record.protocol == "transductive":
            record = dataclasses.replace(record, method=f"{record.method}, transductive")
        study = [] if record.protocol in ("", "inductive", "transductive") else [record.protocol, record.split]
        found["; ".join([record.suite] * several + study)].append(record)
    return found


def table(records: Iterable[Record]) -> Table:
    """A terminal table of the accuracies: methods down, tasks, mean, kept, time and memory across.

    Eight tasks fit 120 columns.  Where it may be narrower (a pipe: 80), ``console.print(…, crop=False)`` cuts nothing.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid, *others = grids(records)
    some = next(iter(grid.cells.values()))
    shown = Table(
        title=Text(f"{some.suite}: {grid.metric}{' in percent' * grid.is_fraction}, {some.split} split, ± 95 % interval"),
        caption=Text(f"also recorded: {', '.join(g.metric for g in others)}") if others else None,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    # Only the tasks' names give way where room is short: rich must cut neither a number nor a method.
    shown.add_column("method", no_wrap=True)
    for name in header(grid):
        if name in grid.tasks:
            shown.add_column(Text(name), justify="right", overflow="fold", min_width=10 if len(grid.tasks) <= FEW else 5)
        else:
            shown.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows(grid):
        cells = [
            Text.assemble((cell.text, "bold" if cell.best else ""), (f" ±{cell.half}" if cell.half and wide else "", "dim"))
            for cell, wide in zip(row.cells, _intervals(grid), strict=True)
        ]
        folded = (row.method[start : start + LONGEST] for start in range(0, len(row.method), LONGEST))
        shown.add_row(Text("\n".join(folded)), *cells, *row.tail)
    return shown


def markdown(records: Iterable[Record]) -> str:
    """The table of `table` as GitHub Markdown; one for each setting, under its name, if there are several."""
    groups = settings(records)
    if len(groups) < 2:
        return _markdown_table(next(iter(groups.values()), []))
    return "\n".join(
        f"### {_markdown(setting) or 'all tasks'}\n\n{_markdown_table(those)}" for setting, those in groups.items()
    )


def _markdown_table(records: Iterable[Record]) -> str:
    grid = grids(records)[0]
    lines = [["method", *map(_markdown, header(grid))], ["---"] + ["---:"] * len(header(grid))]
    for row in rows(grid):
        cells = [
            (f"**{cell.text}**" if cell.best else cell.text) + (f" ±{cell.half}" if cell.half and wide else "")
            for cell, wide in zip(row.cells, _intervals(grid), strict=True)
        ]
        lines.append([_markdown(row.method), *cells, *row.tail])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def html(records: Iterable[Record], title: str) -> str:
    """One self-contained page: what is shown, how it was measured, the tables, and a picture per task."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    records = list(records)
    environment = Environment(
        loader=PackageLoader("eutectic.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = {"header": header, "rows": rows, "panels": panels, "marks": lambda grid: marks(grid.methods)}
    sections = [
        {"grid": grid, "setting": setting} | {name: make(grid) for name, make in shown.items()}
        for setting, those in (settings(records) or {"": records}).items()
        for grid in grids(those)
    ]
    return environment.get_template("report.html.j2").render(title=title, sections=sections, facts=facts(records))


def header(grid: Grid) -> list[str]:
    """The columns after the method's name."""
    return [*grid.tasks, MEAN, *["kept %"] * grid.is_fraction, "wall s", "peak MiB"]


def rows(grid: Grid) -> list[Row]:
    """A row per method, pretrained first and individual last."""
    merges = [method for method in grid.methods if method not in (PRETRAINED, INDIVIDUAL)]
    columns = [*grid.tasks, MEAN]
    # Which direction is better is known for accuracies only.
    values = {c: [grid.cells[m, c].value for m in merges if (m, c) in grid.cells] for c in columns if grid.is_fraction}
    best = {column: max(found) for column, found in values.items() if found}
    ceiling = grid.cells.get((INDIVIDUAL, MEAN))
    shown = []
    for method in grid.methods:
        cells = []
        for column in columns:
            record = grid.cells.get((method, column))
            cells.append(_cell(grid, record, method in merges and record.value == best.get(column)) if record else Cell())
        mean = grid.cells.get((method, MEAN))
        kept = f"{100 * mean.value / ceiling.value:.1f}" if mean and ceiling and ceiling.value else "–"
        wall = f"{mean.wall_s:.1f}" if mean and mean.wall_s else "–"
        peak = f"{mean.peak_rss_bytes / 2**20:.0f}" if mean and mean.peak_rss_bytes else "–"
        shown.append(Row(method, cells, [*[kept] * grid.is_fraction, wall, peak]))
    return shown


def marks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method: colours cycle, and each new cycle has another shape."""
    found = {PRETRAINED: (INK, SHAPES[0]), INDIVIDUAL: (INK, SHAPES[3])}
    for index, method in enumerate(method for method in methods if method not in found):
        found[method] = (COLOURS[index % len(COLOURS)], SHAPES[index // len(COLOURS) % len(SHAPES)])
    return {method: found[method] for method in methods}


def panels(grid: Grid) -> list[dict[str, object]]:
    """The picture: one panel per task and the mean, in SVG units; a dot with whiskers per method that has a number."""
    if not grid.is_fraction:
        return []
    left = 8 + LETTER * min(LONGEST, max(map(len, grid.methods)))
    bottom = TOP + ROW * len(grid.methods)

    def x(fraction: float) -> float:
        return round(left + fraction * (WIDTH - 14 - left), 1)

    drawn: list[dict[str, object]] = []
    for task in [*grid.tasks, MEAN]:
        dots: list[dict[str, object]] = []
        for index, (method, (colour, shape)) in enumerate(marks(grid.methods).items()):
            y = TOP + ROW * index + ROW // 2
            dot: dict[str, object] = {"name": _short(method, LONGEST), "full": method, "y": y, "record": None}
            if record := grid.cells.get((method, task)):
                story = f"{method}, {task}: {_cell(grid, record).story}"
                dot |= {"record": record, "story": story, "colour": colour, "path": f"M{x(record.value)} {y}{shape}"}
                dot |= {"low": x(max(0.0, record.low)), "high": x(min(1.0, record.high))}
            dots.append(dot)
        lines = {m: x(grid.cells[m, task].value) for m in (PRETRAINED, INDIVIDUAL) if (m, task) in grid.cells}
        ticks = [(percent, x(percent / 100)) for percent in (0, 25, 50, 75, 100)]
        geometry: dict[str, object] = {
            "width": WIDTH,
            "height": bottom + BOTTOM,
            "left": round(left, 1),
            "top": TOP,
            "bottom": bottom,
        }
        drawn.append(geometry | {"title": task, "short": _short(task, 40), "dots": dots, "lines": lines, "ticks": ticks})
    return drawn


def facts(records: Sequence[Record]) -> dict[str, list[str] | list[tuple[str, str]]]:
    """What the records say of how they were made: distinct values, in order of appearance."""
    values: dict[str, list[str]] = {
        name: [str(getattr(r, name)) for r in records] for name in ("suite", "split", "protocol", "seed")
    }
    values["versions"] = [f"{name} {version}" for record in records for name, version in record.versions.items()]
    pairs = {
        "notes": [(record.method, record.notes) for record in records],
        "parameters": [(r.method, ", ".join(f"{name} = {value}" for name, value in r.parameters.items())) for r in records],
        "recipes": [(record.method, record.recipe_sha256) for record in records],
        "inputs": [pair for record in records for pair in record.inputs.items()],
    }
    found: dict[str, list[str] | list[tuple[str, str]]] = {}
    found |= {name: [value for value in dict.fromkeys(those) if value] for name, those in values.items()}
    return found | {name: [pair for pair in dict.fromkeys(those) if pair[1]] for name, those in pairs.items()}


def _grid(metric: str, records: list[Record]) -> Grid:
    seeds: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        seeds[record.method, record.task].append(record)
    cells = {key: _over_seeds(found) for key, found in seeds.items()}
    place = {PRETRAINED: -1, INDIVIDUAL: 1}
    methods = sorted(dict.fromkeys(record.method for record in records), key=lambda method: place.get(method, 0))
    tasks = [task for task in dict.fromkeys(record.task for record in records) if task != MEAN]
    for method in methods:
        # A mean over some of the tasks would not compare with the others, and mean_of is for fractions.
        if (method, MEAN) not in cells and _is_fraction(metric, records) and all((method, task) in cells for task in tasks):
            cells[method, MEAN] = mean_of([cells[method, task] for task in tasks])
    return Grid(metric, methods, tasks, cells)


def _with_printable(record: Record, names: Iterable[str]) -> Record:
    texts: dict[str, Any] = {name: _printable(getattr(record, name)) for name in names}
    return dataclasses.replace(record, **texts)


def _over_seeds(records: list[Record]) -> Record:
    """The average over seeds.  They share their samples, so the interval is the average one and no narrower."""

    def average(name: str) -> float:
        return sum(getattr(record, name) for record in records) / len(records)

    averages: dict[str, Any] = {name: average(name) for name in ("value", "low", "high", "wall_s")}
    return dataclasses.replace(records[-1], **averages, peak_rss_bytes=max(r.peak_rss_bytes for r in records))


def _is_fraction(metric: str, records: Iterable[Record]) -> bool:
    return "accuracy" in metric.lower() and all(0 <= record.value <= 1 for record in records)


def _cell(grid: Grid, record: Record, best: bool = False) -> Cell:
    form = (lambda value: f"{100 * value:.1f}") if grid.is_fraction else (lambda value: f"{value:.4g}")
    story = f"{form(record.value)} [{form(record.low)}, {form(record.high)}], n = {record.n}"
    return Cell(form(record.value), form((record.high - record.low) / 2), best, story)


def _intervals(grid: Grid) -> list[bool]:
    """Which cells have room for their interval: the mean, and few tasks."""
    return [len(grid.tasks) <= FEW] * len(grid.tasks) + [True]


def _printable(name: str) -> str:
    """The name without control characters: they would steer a terminal, and are not allowed in XML."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _markdown(name: str) -> str:
    return re.sub(r"[\\`*\[\]<>|~&]|\b_|_\b", r"\\\g<0>", name)
