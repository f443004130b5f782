"""An audit as a terminal table, as JSON for a pipeline, and as one self-contained HTML page."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eutectic.security.audit import PATH, Audit, Found, Probe, percent
from eutectic.task import Score

if TYPE_CHECKING:
    from rich.table import Table

#: never more than this is said of an expert that nothing was found against
NOTHING = "no evidence under these probes"


def table(found: Audit) -> Table:
    """A row for each expert: what its trigger does to the base, to itself, to the merge, and what goes with it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=f"audit of {found.merge}", box=box.SIMPLE)
    shown.add_column("expert", no_wrap=True)
    for name in ("trigger", "at base", "at expert", "gain ±", "on merge", "without it"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("found")
    probes = {probe.task: probe for probe in found.probes}
    for expert in found.screens:
        probe, lines = probes.get(expert), found.evidence(expert)
        cells = ["–"] * 6 if probe is None else _cells(probe)
        said = "SUSPECT" if expert in found.suspects else f"{len(lines)} signal(s) of the weights" if lines else NOTHING
        shown.add_row(Text(expert), *cells, Text(said, style="bold" if expert in found.suspects else "dim"))
    return shown


def _cells(probe: Probe) -> list[str]:
    gain, low, high = probe.gain
    return [
        f"{probe.mode} → {probe.target}",
        percent(probe.path[0].value),
        percent(probe.path[-1].value),
        f"{percent(gain)} ±{100 * (high - low) / 2:.0f}",
        percent(probe.merged.value),
        percent(probe.without[probe.task].value),
    ]


def to_json(found: Audit) -> dict[str, Any]:
    """The audit as JSON-ready data; rates are fractions with their 95 % intervals."""
    return {
        "merge": found.merge,
        "probed": found.probed,
        "skipped": found.skipped,
        "suspects": found.suspects,
        "experts": {
            name: {
                "verdict": "suspect" if name in found.suspects else NOTHING,
                "evidence": found.evidence(name),
                "screens": [one._asdict() for one in lines],
            }
            for name, lines in found.screens.items()
        },
        "probes": [_probe_json(probe) for probe in found.probes],
        "joint": [_found_json(one) for one in found.joint],
    }


def _probe_json(probe: Probe) -> dict[str, Any]:
    path = [{"share": share, **_score(score)} for share, score in zip(PATH, probe.path, strict=True)]
    return _found_json(probe) | {"path": path, "gain": _interval(probe.gain)}


def _found_json(found: Found) -> dict[str, Any]:
    return {
        "task": found.task,
        "mode": found.mode,
        "target": found.target,
        "merged": _score(found.merged),
        "without": {name: _score(score) for name, score in found.without.items()},
        "drop": {name: _interval(found.drop(name)) for name in found.without},
    }


def _score(score: Score) -> dict[str, float]:
    return score._asdict()


def _interval(of: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), of, strict=True))


def html(found: Audit, title: str) -> str:
    """One page: what was probed, what was found for each expert, the triggers as pictures, and the attribution."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("eutectic.security"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    experts = [
        {"name": name, "suspect": name in found.suspects, "lines": found.evidence(name) or [NOTHING], "screens": lines}
        for name, lines in found.screens.items()
    ]
    probes = [
        {
            "probe": probe,
            "picture": None if probe.picture is None else picture(probe.picture),
            "line": _line(probe),
            "cells": _cells(probe),
        }
        for probe in found.probes
    ]
    return environment.get_template("audit.html.j2").render(
        title=title, found=found, experts=experts, probes=probes, names=list(found.screens), percent=percent, shares=PATH
    )


#: SVG units of the plot of success over λ
WIDTH, HEIGHT, EDGE = 220, 90, 16


def _line(probe: Probe) -> list[tuple[float, float, Score]]:
    """Points of success over λ."""
    return [
        (round(EDGE + share * (WIDTH - 2 * EDGE), 1), round(HEIGHT - EDGE - score.value * (HEIGHT - 2 * EDGE), 1), score)
        for share, score in zip(PATH, probe.path, strict=True)
    ]


def picture(pixels: Tensor) -> str:
    """An image ``[3, H, W]`` in [0, 1] as a ``data:`` address of a PNG."""
    rows = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    height, width = rows.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    scanned = b"".join(b"\0" + row.numpy().tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanned, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()
