"""Write the pages under docs/ that follow from the code and the records; with --check, fail if they are not what is there."""

from __future__ import annotations

import inspect
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer
from typer.testing import CliRunner

from eutectic import cli, record, registry
from eutectic.methods._method import signature_model
from eutectic.security.metrics import der
from eutectic.security.scores import ASR

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS.parent / "benchmarks" / "results"
SAFETY = ("mean", "accuracy", ASR, "robust accuracy")


def methods_page() -> str:
    """Every registered method: its docstring, parameters and source."""
    parts = ["# Methods\n\nWritten by `make docs` from the docstrings.  `eutectic methods NAME` prints the same.\n"]
    for room, title in (("methods", "Closed form"), ("fusion", "Fitted to data"), ("ensemble", "Predictions combined")):
        parts.append(f"# {title}\n")
        for name in registry.names(room):
            doc, source = inspect.getdoc(registry.get(room, name)) or "", registry.reference(room, name)
            parts.append(f"## {name}\n\n```text\n{doc}\n```\n\n{_parameters(name)}\n\nReference: {source}.\n")
    return "\n".join(parts)


def _parameters(name: str) -> str:
    lines = ["| parameter | default | type and range |", "|---|---|---|"]
    for key, field in signature_model(name).model_json_schema()["properties"].items():
        rest = ", ".join(f"{k} {v}" for k, v in field.items() if k not in ("title", "default"))
        lines.append(f"| `{key}` | `{field.get('default')}` | {rest.replace('|', '∣')} |")
    return "\n".join(lines)


def fitted_page() -> str:
    """Methods that are fitted to data, scored with several seeds: a table for each file of records."""
    parts = [
        "# Methods fitted to data: results\n\n"
        "Written by `make docs` from the records in `benchmarks/results`.  Mean accuracy over the tasks' `test` sets in\n"
        "percent, ± its standard deviation over seeds (which fix batches and masks; base, experts and tasks are the same).\n"
        "Seconds are of the fit, the merge and the scoring; `fusion.md` says on what machine.\n"
    ]
    for path in sorted(RESULTS.glob("*-fitted.jsonl")):
        runs: dict[tuple[str, str], dict[int, record.Record]] = {}
        for found in record.load(path):
            if found.task == "mean":
                runs.setdefault((found.method, found.protocol), {})[found.seed] = found
        parts.append(f"## {path.name.removesuffix('-fitted.jsonl')}\n")
        lines = ["| method | protocol | mean | ± sd | seeds | seconds | peak MiB |", "|---|---|---:|---:|---:|---:|---:|"]
        for (method, protocol), by_seed in sorted(runs.items(), key=lambda run: -_mean(run[1])):
            values = [100 * r.value for r in by_seed.values()]
            deviation = f"{statistics.stdev(values):.1f}" if len(values) > 1 else "–"
            seconds = statistics.median(r.wall_s for r in by_seed.values())
            peak = max(r.peak_rss_bytes for r in by_seed.values()) / 2**20
            cells = [
                method,
                protocol,
                f"{statistics.mean(values):.1f}",
                deviation,
                len(values),
                f"{seconds:.0f}",
                f"{peak:.0f}",
            ]
            lines.append(_row(cells))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _mean(by_seed: dict[int, record.Record]) -> float:
    return statistics.mean(r.value for r in by_seed.values())


def reach_page() -> str:
    """Fused networks on tasks that none of their experts knew, and on corrupted images: a table for each file of records."""
    parts = [
        "# Unseen tasks and corrupted images: results\n\n"
        "Written by `make docs` from the records in `benchmarks/results`.  Mean accuracy over tasks in percent, ± its\n"
        "standard deviation over seeds, where there are several.\n"
    ]
    parts += [_unseen(path) for path in sorted(RESULTS.glob("*-generalisation.jsonl"))]
    parts += [_corrupted(path) for path in sorted(RESULTS.glob("*-robustness.jsonl"))]
    return "\n".join(parts)


def _unseen(path: Path) -> str:
    values: dict[tuple[str, str, str], list[float]] = {}
    for found in record.load(path):
        unseen = found.protocol.removeprefix("generalisation: unseen ").split(";")[0]
        values.setdefault((found.method, unseen, found.task), []).append(100 * found.value)
    columns = [(unseen, which) for unseen in dict.fromkeys(u for _, u, _ in values) for which in ("seen", "unseen")]
    rows = {
        method: [values.get((method, unseen, f"mean of {which}"), []) for unseen, which in columns]
        for method in dict.fromkeys(method for method, _, _ in values)
    }
    heads = ["method", *(f"without {unseen}: {which}" for unseen, which in columns)]
    return (
        f"## {path.name.removesuffix('-generalisation.jsonl')}: unseen tasks\n\n"
        "Only the seen tasks' experts are fused; all tasks have their heads.\n\n"
        f"{_means_table(heads, [([method], cells) for method, cells in rows.items()])}"
    )


def _corrupted(path: Path) -> str:
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    tasks: dict[str, None] = {}
    for found in record.load(path):
        adapted = found.protocol.removeprefix("robustness: adapted to ").split(" ")[0]
        if found.task == "mean":
            table.setdefault((found.method, adapted), {}).setdefault(found.split, []).append(100 * found.value)
        else:
            tasks[found.task] = None
    splits = list(dict.fromkeys(split for row in table.values() for split in row))
    rows = []
    for names, cells in table.items():
        worse = [value for split, values in cells.items() if split != "test" for value in values]
        rows.append((names, [*(cells.get(split, []) for split in splits), [statistics.mean(worse)]]))
    heads = [split.removeprefix("test, ").replace("test", "clean") for split in splits]
    return (
        f"## {path.name.removesuffix('-robustness.jsonl')}: corrupted images\n\n"
        f"Tasks: {', '.join(tasks)}.  A column is a corruption and its severity, 1 to 5.\n\n"
        f"{_means_table(['method', 'adapted to', *heads, 'mean of corrupted'], rows)}"
    )


def _means_table(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[list[float]]]]) -> str:
    """A table of names and, in the columns after them, of means over seeds."""
    numbers = len(rows[0][1])
    lines = [_row(heads), f"|{'---|' * (len(heads) - numbers)}{'---:|' * numbers}"]
    for names, cells in rows:
        lines.append(_row([*names, *(_spread(cell, statistics.mean, 1) for cell in cells)]))
    return "\n".join(lines) + "\n"


def language_page() -> str:
    """Fused language models: perplexity on each domain, and its ratio to the base's."""
    parts = [
        "# Language models: results\n\n"
        "Written by `make docs` from `benchmarks/results/lm.jsonl`, which `benchmarks/language.py` makes.\n\n"
        "SmolLM2-135M-Instruct (dequantised from four bits) and three LoRA fine-tunes of it, of rank 16 on every linear\n"
        "layer: sentences of movie reviews, one-line descriptions of Debian packages, WordNet glosses.  `brown`, excerpts of\n"
        "the Brown corpus, has no expert.  Scales (λ) are chosen on texts that are not scored.  The mean is the geometric\n"
        "one, over the domains that have an expert.  Intervals are of 95 %, over texts;\n"
        "those of ratios compare the same texts.\n\n"
        "SMILE chooses experts token by token, by that token's state alone: padding, batch-mates and later tokens change\n"
        "nothing.  WEMoE is not in the table: its routers average over all tokens of a text, also those to be predicted, so\n"
        "what it gave would be no perplexity.\n"
    ]
    found: dict[str, dict[str, dict[str, record.Record]]] = {}
    for one in record.load(RESULTS / "lm.jsonl"):
        found.setdefault(one.metric, {}).setdefault(one.method, {})[one.task] = one
    for metric, methods in found.items():
        domains = list(next(iter(methods.values())))
        parts.append(f"## {metric[0].upper()}{metric[1:]}\n")
        lines = [_row(["model", *domains, "chosen"]), f"|---|{'---:|' * len(domains)}---|"]
        for method, cells in methods.items():
            shown = [_with_interval(cells[domain]) if domain in cells else "–" for domain in domains]
            scale = next(iter(cells.values())).parameters.get("scale")
            lines.append(_row([method, *shown, "" if scale is None else f"λ = {scale}"]))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _with_interval(r: record.Record) -> str:
    digits = 3 if r.value < 3 else 1
    return f"{r.value:.{digits}f} ({r.low:.{digits}f}–{r.high:.{digits}f})"


def reuse_page() -> str:
    """Networks that cannot be merged, combined: accuracy on each split, against what was published."""
    parts = [
        "# Networks that cannot be merged: results\n\n"
        "Written by `make docs` from `benchmarks/results/reuse.jsonl`, which `benchmarks/reuse.py` makes; `reuse.md` says\n"
        "what the rules are.  Accuracy on the 10,000 test images of Fashion-MNIST in percent, ± its standard deviation over\n"
        "seeds where there are several.  `examples` counts labelled images that the parties share, or, of `hmr`, those looked\n"
        "at for an exchange.  One image more or less is 0.01; the 95 % interval of one number is about ± 0.6.\n"
    ]
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for one in record.load(RESULTS / "reuse.jsonl"):
        name = "one party, the best" if one.method.startswith("individual") and one.task != "all" else one.method
        found.setdefault((name, one.parameters["examples"]), {}).setdefault(one.task, []).append(100 * one.value)
    seeds = {(one.task, one.seed) for one in record.load(RESULTS / "reuse.jsonl")}
    said = ", ".join(f"{split}: {sum(task == split for task, _ in seeds)}" for split in "ABCD")
    parts.append(f"Seeds of each split: {said}.\n")
    lines = ["| rule | examples | A | B | C | D |", "|---|---:|---:|---:|---:|---:|"]
    for (name, size), cells in found.items():
        if "all" not in cells:
            shown = [
                _spread(cells.get(split, []), max if name.startswith("one party") else statistics.mean) for split in "ABCD"
            ]
            lines.append(_row([name, size or "", *shown]))
    lines.append("| *published, no exchange* | | 91.3 | 88.4 | 84.6 | 84.8 |")
    parts.append("\n".join(lines) + "\n")
    whole = [value for cells in found.values() for value in cells.get("all", [])]
    if whole:
        parts.append(f"One network of all data: {_spread(whole, statistics.mean)}.\n")
    return "\n".join(parts)


def safety_page() -> str:
    """Attacks and defences: each attack on each merge, its controls, and what is left after each defence."""
    parts = [
        "# Safety panel\n\n"
        "Written by `make docs` from `benchmarks/results/*-safety.jsonl`, which `benchmarks/safety.py` makes; `safety.md`\n"
        "says what attacks and defences are.  Percent of `test`, ± the standard deviation over seeds where there are several:\n"
        "of all tasks' accuracy the mean, and of the attacked task the accuracy, the attack success rate (ASR, over inputs\n"
        "of other classes) and the accuracy under the trigger.  DER is 50 for doing nothing, 100 for removing the trigger at\n"
        "no cost.  Seconds are those of making the weights, on a busy machine: they say which defence is dear.  The 95 %\n"
        "interval of one ASR is about ± 5.\n"
    ]
    for path in sorted(RESULTS.glob("*-safety.jsonl")):
        attacks: dict[str, list[record.Record]] = {}
        for one in record.load(path):
            attacks.setdefault(one.notes.split("; ")[1], []).append(one)
        for attack, found in attacks.items():
            parts += [f"## {path.name.removesuffix('-safety.jsonl')}: {attack}\n", _attacked(found)]
    return "\n".join(parts)


def _attacked(found: Sequence[record.Record]) -> str:
    """The table of one attack on a suite."""
    rows: dict[str, dict[int, dict[str, float]]] = {}
    (task,) = {one.task for one in found if one.metric == ASR}
    for one in found:
        kept = one.parameters.keys() - {"method", "parameters"}
        changed = ", ".join(f"{name} {one.parameters[name]}" for name in sorted(kept))
        cell = rows.setdefault(one.method + (f" ({changed})" if changed else ""), {}).setdefault(one.seed or 0, {})
        if one.task in (task, "mean"):
            metric = "mean" if one.task == "mean" else one.metric
            if metric in cell:
                raise ValueError(f"{one.suite}, {one.method}, seed {one.seed}: {metric} is on record twice, {one.notes}")
            cell[metric] = 100 * one.value
            cell["seconds"] = one.wall_s or 0.0
    lines = [_row(["network", "seeds", "mean", task, "ASR", "under the trigger", "DER", "s"]), f"|---|{'---:|' * 7}"]
    for name, seeds in rows.items():
        shown = [[cell[metric] for cell in seeds.values() if metric in cell] for metric in SAFETY]
        undefended = rows.get(f"{name.split(' (')[0].split(' over ')[-1]}, poisoned", {}) if " over " in name else {}
        ders = [
            100 * der(*(x / 100 for x in (undefended[seed]["mean"], cell["mean"], undefended[seed][ASR], cell[ASR])))
            for seed, cell in seeds.items()
            if seed in undefended
        ]
        spent = statistics.mean(cell["seconds"] for cell in seeds.values())
        columns = [_spread(values, statistics.mean, 1) for values in (*shown, ders)]
        lines.append(_row([name, len(seeds), *columns, f"{spent:.0f}" if ders else "–"]))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    """A line of a table; a bar in a cell does not end it."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _spread(values: list[float], middle: Callable[[list[float]], float], digits: int = 2) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and middle is statistics.mean else ""
    return f"{middle(values):.{digits}f}{deviation}"


def cli_page() -> str:
    """The help of every command."""
    parts = ["# Command line\n\nWritten by `make docs` from `--help`.\n"]
    for path in [[], *_commands(cli.app)]:
        text = CliRunner().invoke(cli.app, [*path, "--help"], prog_name="eutectic", env={"COLUMNS": "110"}).output
        parts.append(f"## {' '.join(['eutectic', *path])}\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _commands(app: typer.Typer) -> list[list[str]]:
    names = [[c.name or str(c.callback and c.callback.__name__)] for c in app.registered_commands]
    for group in app.registered_groups:
        names += [[str(group.name), *path] for path in ([], *_commands(group.typer_instance or typer.Typer()))]
    return names


def main() -> int:
    """Write the pages, or compare them."""
    stale = 0
    pages = {"methods.md": methods_page(), "cli.md": cli_page(), "fitted.md": fitted_page(), "language.md": language_page()}
    pages |= {"reuse-results.md": reuse_page(), "reach.md": reach_page(), "safety-panel.md": safety_page()}
    for name, text in pages.items():
        path = DOCS / name
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what the code says: run `make docs`", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
