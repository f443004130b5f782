"""One measured number with everything needed to trust it; files of them are append-only JSON lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from eutectic.errors import EutecticError


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured number.

    ``value``, ``low`` and ``high`` are in the metric's unit (accuracy: a fraction of 1); ``low`` and ``high``
    bound the 95 % interval over the ``n`` scored samples.  ``method`` is ``pretrained``, ``individual`` or a
    registered method.  ``wall_s`` and ``peak_rss_bytes`` are of the step that made the number; ``inputs`` are the
    fingerprints of the weights that went into it.
    """

    suite: str
    method: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    split: str = "test"
    seed: int = 0
    wall_s: float = 0.0
    peak_rss_bytes: int = 0
    recipe_sha256: str = ""
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    protocol: str = ""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: str = ""

    def to_json(self) -> str:
        """One JSON line, keys in declaration order."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records to a JSON-lines file, creating it and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)


def load(path: Path) -> Iterator[Record]:
    """Records of a JSON-lines file.  Raises EutecticError naming the file and line that is not a record."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Record(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise EutecticError(f"{path}, line {number}: not a record: {error}") from error


#: what a merge's bits depend on: not on what else a process happens to have imported
ENGINE = ("eutectic", "torch")


def versions(packages: Sequence[str] = (*ENGINE, "transformers")) -> dict[str, str]:
    """Versions of whatever can change a number: those of the packages in use, Python's, and the machine's kind."""
    found = {name: _version(name) for name in packages if name == "eutectic" or name in sys.modules}
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def reset_peak_rss() -> None:
    """Begin anew to look for the peak of resident memory, where the system can (Linux); elsewhere it is that of the process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """The largest resident memory of this process, in bytes, since it began or ``reset_peak_rss``."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927, JASA 22:209), at 95 % for the default ``z``."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n}")
    p, zz = hits / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of(records: list[Record], task: str = "mean") -> Record:
    """The unweighted mean over tasks as a record of its own.

    Its interval treats the tasks as fixed and their samples as independent: the standard error is
    sqrt(Σ sᵢ²)/T, each sᵢ taken from the task's own interval.
    """
    value = sum(r.value for r in records) / len(records)
    half = math.sqrt(sum(((r.high - r.low) / 2) ** 2 for r in records)) / len(records)
    first = records[0]
    return dataclasses.replace(
        first,
        task=task,
        value=value,
        low=max(0.0, value - half),
        high=min(1.0, value + half),
        n=sum(r.n for r in records),
        wall_s=sum(r.wall_s for r in records),
        peak_rss_bytes=max(r.peak_rss_bytes for r in records),
        inputs={key: value for r in records for key, value in r.inputs.items()},
    )
