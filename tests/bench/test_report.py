"""The report: what stands in its tables, its page and its picture."""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from eutectic.bench import report
from eutectic.errors import EutecticError
from eutectic.record import Record, mean_of, wilson

TASKS = ("digits", "letters", "pathmnist", "bloodmnist", "organamnist", "fashion", "kuzushiji", "satellite")
METHODS = {"pretrained": 0.49, "individual": 0.83, "average": 0.52, "task_arithmetic": 0.55, "concrete_adamerging": 0.61}
EVIL = """<script>alert("1")</script>|[bold]&'\x1b[31m"""


def scored(method: str, task: str, hits: int, n: int = 400, **fields: object) -> Record:
    low, high = wilson(hits, n)
    return Record("mini", method, task, "accuracy", hits / n, low, high, n, **fields)


def run(methods: dict[str, float] = METHODS, tasks: tuple[str, ...] = TASKS, seed: int = 0) -> list[Record]:
    rng = random.Random(seed)
    made = []
    for method, centre in methods.items():
        fields = {"wall_s": 0.5, "peak_rss_bytes": 300 * 2**20, "versions": {"torch": "2.9"}, "inputs": {"base": "ab12"}}
        found = [scored(method, task, round(400 * (centre + rng.uniform(-0.15, 0.15))), **fields) for task in tasks]
        made += [*found, dataclasses.replace(mean_of(found), wall_s=2.5)]
    return made


def printed(records: list[Record], width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(report.table(records), crop=False)
    return out.getvalue()


def styled(records: list[Record]) -> dict[str, list[str]]:
    """The bold cells of each method's row in the terminal."""
    shown = report.table(records)
    columns = [list(column.cells) for column in shown.columns]

    def bold(cell: object) -> bool:
        return not isinstance(cell, str) and any(span.style == "bold" for span in cell.spans)

    return {str(row[0]): [str(cell) for cell in row[1:] if bold(cell)] for row in zip(*columns, strict=True)}


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S) if 'role="img"' in svg]


def drawn(page: str, kind: str) -> list[ElementTree.Element]:
    return [path for picture in pictures(page) for path in picture.iter("path") if path.get("class") == kind]


class Page(HTMLParser):
    """Collects tags, attributes and table cells, and checks that what is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip() and data


def test_order_and_numbers() -> None:
    records = [*run(tasks=("b", "a"))]
    grid = report.grids(records)[0]
    assert grid.methods == ["pretrained", "average", "task_arithmetic", "concrete_adamerging", "individual"]
    assert report.header(grid) == ["b", "a", "mean", "kept %", "wall s", "peak MiB"]
    mean = {r.method: r for r in records if r.task == "mean"}
    for row in report.rows(grid):
        record = mean[row.method]
        assert row.cells[-1].text == f"{100 * record.value:.1f}"
        assert row.cells[-1].half == f"{50 * (record.high - record.low):.1f}"
        assert row.tail == [f"{100 * record.value / mean['individual'].value:.1f}", "2.5", "300"]
    assert report.rows(grid)[-1].tail[0] == "100.0"


def test_best_merge_of_each_column_is_bold_and_experts_are_not() -> None:
    records = [scored(m, "a", h) for m, h in (("pretrained", 300), ("ties", 200), ("average", 100), ("individual", 390))]
    assert styled(records) == {"pretrained": [], "ties": ["50.0 ±4.9", "50.0 ±4.9"], "average": [], "individual": []}
    assert "| ties | **50.0** ±4.9 | **50.0** ±4.9 | 51.3 | – | – |" in report.markdown(records)


def test_eight_tasks_are_readable_at_120_columns() -> None:
    records = run(METHODS | {"m" * 26: 0.5})
    text = printed(records)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    line = next(line for line in text.splitlines() if "concrete_adamerging" in line).split()
    row = next(row for row in report.rows(report.grids(records)[0]) if row.method == "concrete_adamerging")
    assert line == [row.method, *(cell.text for cell in row.cells), f"±{row.cells[-1].half}", *row.tail]
    assert printed(run(tasks=TASKS[:4])).count("±") == 1 + 5 * len(METHODS), "one in the title, five a method"


def test_markdown_is_rectangular_and_escaped() -> None:
    lines = report.markdown(run({"a|b": 0.5, "task_arithmetic": 0.5}, tasks=("_x_",))).splitlines()
    assert lines[0] == r"| method | \_x\_ | mean | kept % | wall s | peak MiB |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2].startswith(r"| a\|b |")
    assert lines[3].startswith("| task_arithmetic |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_page_parses_is_self_contained_and_shows_every_interval() -> None:
    records = run()
    source = report.html(records, "Run <1>")
    page = Page(source)
    assert not page.open
    assert "<h1>Run &lt;1&gt;</h1>" in source
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import", source)
    assert not any({"src", "href"} & set(attrs) for _, attrs in page.tags)
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["method"] == [*TASKS, "mean", "kept %", "wall s", "peak MiB"]
    for record in records:
        cell = rows[record.method][rows["method"].index(record.task)]
        assert cell == f"{100 * record.value:.1f} ±{50 * (record.high - record.low):.1f}"
    assert rows["base"] == ["ab12"]
    assert "torch 2.9" in source
    assert "prefers-color-scheme: dark" in source
    for name, value in (("suite", "mini"), ("split", "test"), ("seed", "0")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in source


def test_picture_has_a_dot_per_number_at_its_place() -> None:
    records = run()
    source = report.html(records, "t")
    found = pictures(source)
    assert len(found) == len(TASKS) + 1
    assert len(drawn(source, "dot")) == len(records)
    assert len(drawn(source, "individual")) == len(drawn(source, "pretrained")) == len(found)
    panel = report.panels(report.grids(records)[0])[0]
    low, high = panel["ticks"][0][1], panel["ticks"][-1][1]
    for dot in panel["dots"]:
        x = float(re.match(r"M([\d.]+)", dot["path"])[1])
        assert x == pytest.approx(low + dot["record"].value * (high - low), abs=0.1)
        assert dot["low"] < x < dot["high"]
        assert dot["full"] in dot["story"]


def test_thirty_methods_by_twenty_tasks_do_not_overlap() -> None:
    methods = {f"a_method_with_quite_a_long_name_{i}": 0.5 for i in range(30)}
    records = run(methods, tuple(f"task {i}" for i in range(20)))
    grid = report.grids(records)[0]
    assert len(set(report.marks(grid.methods).values())) == 30
    panels = report.panels(grid)
    assert len(panels) == 21
    for panel in panels:
        heights = [dot["y"] for dot in panel["dots"]]
        assert min(b - a for a, b in itertools.pairwise(heights)) >= 12
        assert heights[-1] < panel["bottom"]
        assert all(len(dot["name"]) * report.LETTER < panel["left"] for dot in panel["dots"])
        assert panel["ticks"][-1][1] < panel["width"] - 10
    assert len(pictures(report.html(records, "t"))) == 21


def test_names_from_outside_are_escaped_everywhere() -> None:
    records = run({EVIL: 0.5, "individual": 0.8}, tasks=(EVIL, "ok"))
    records = [dataclasses.replace(r, notes=EVIL, inputs={EVIL: EVIL}, versions={EVIL: EVIL}) for r in records]
    source = report.html(records, EVIL)
    assert "<script" not in source
    assert pictures(source)
    assert not {"onload", "onclick"} & {name for _, attrs in Page(source).tags for name in attrs}
    text = printed(records, width=300)
    assert "\x1b" not in text
    assert "[bold]" in text
    assert "\x1b" not in report.markdown(records)


def test_last_duplicate_wins_and_seeds_are_averaged() -> None:
    records = [scored("ties", "a", 100), scored("ties", "a", 200), scored("ties", "a", 300, seed=1)]
    cell = report.grids(records)[0].cells["ties", "a"]
    assert cell.value == pytest.approx((0.5 + 0.75) / 2)
    assert report.grids(records[:2])[0].cells["ties", "a"] == records[1]
    assert "0, 1 (averaged)" in report.html(records, "t")


def test_mean_is_derived_only_over_all_tasks() -> None:
    records = [scored("ties", "a", 100), scored("ties", "b", 200), scored("dare", "a", 100)]
    cells = report.grids(records)[0].cells
    assert cells["ties", "mean"] == mean_of(records[:2])
    assert ("dare", "mean") not in cells
    rows = {row.method: row for row in report.rows(report.grids(records)[0])}
    assert [cell.text for cell in rows["dare"].cells] == ["25.0", "–", "–"]
    assert rows["dare"].tail == ["–"] * 3
    assert len(drawn(report.html(records, "t"), "dot")) == 4


def test_other_metrics_have_their_own_table_and_no_picture() -> None:
    loss = Record("mini", "ties", "a", "loss", 2.34567, 2.0, 3.0, 10)
    losses = [loss, dataclasses.replace(loss, task="b", value=1.0, low=0.5, high=1.5)]
    records = [*losses, scored("ties", "a", 100)]
    assert [grid.metric for grid in report.grids(records)] == ["accuracy", "loss"]
    page = Page(report.html(records, "t"))
    assert ["ties", "2.346 ±0.5", "1 ±0.5", "–", "–", "–"] in page.rows
    assert len(pictures(report.html(losses, "t"))) == 0
    assert len(pictures(report.html(records, "t"))) == 2
    assert "also recorded: loss" in printed(records)
    assert "2.346" not in printed(records)


@pytest.mark.parametrize("show", [report.table, report.markdown, lambda records: report.html(records, "t")])
def test_refusals(show: object) -> None:
    with pytest.raises(EutecticError, match="nothing to report"):
        show([])
    with pytest.raises(EutecticError, match=r"one split.*test, validation"):
        show([scored("ties", "a", 1), dataclasses.replace(scored("ties", "a", 1), split="validation")])


def test_several_suites_are_shown_one_after_the_other() -> None:
    records = [scored("ties", "a", 1), dataclasses.replace(scored("ties", "b", 1), suite="dino")]
    assert list(report.settings(records)) == ["mini", "dino"]
    assert report.markdown(records) == "\n".join(f"### {one.suite}\n\n{report.markdown([one])}" for one in records)
    assert len(pictures(report.html(records, "t"))) == 4  # of each a task and the mean
    with pytest.raises(EutecticError, match=r"one suite.*dino, mini"):
        report.table(records)


def test_records_may_be_a_stream() -> None:
    assert report.markdown(iter(run())) == report.markdown(run())
    assert report.html(iter(run()), "t") == report.html(run(), "t")
