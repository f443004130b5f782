"""Walking a checkpoint once, into files."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Span, element_bytes
from eutectic.checkpoint.hashed import LEAF, Leaves, leaf_hashes, root_hash
from eutectic.checkpoint.publish import Journal
from eutectic.checkpoint.spec import layout_nbytes
from eutectic.checkpoint.writer import MAX_SHARD_BYTES, SafetensorsWriter

Progress = Callable[[str, int, int], None]  # what, done, total
Unit = list[Span]

#: Elements that one thread reads and writes at once, and small tensors that are then taken together.
CHUNK, TOGETHER = 4 * LEAF, 256
#: Elements after which what was measured is applied: while a pass over so few can still be in the page cache.
WINDOW = 1 << 28


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


class Budget:
    """Bytes of memory that threads share: each waits for its part, and gives it back."""

    def __init__(self, nbytes: float) -> None:
        """``nbytes`` may be infinite."""
        self._free, self._size, self._turn = nbytes, nbytes, threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Generator[None, None, None]:
        """Have ``nbytes``, or all there are, while the body runs."""
        part = min(nbytes, self._size)
        with self._turn:
            self._turn.wait_for(lambda: self._free >= part)
            self._free -= part
        try:
            yield
        finally:
            with self._turn:
                self._free += part
                self._turn.notify_all()


def save_tensors(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int = 2,
    budget_bytes: float = float("inf"),
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Leaves:
    """Write any checkpoint, chunk by chunk, as safetensors files into an existing folder; returns its leaves' hashes.

    At most ``threads`` chunks are in memory, and fewer if they would need more than ``budget_bytes``.  ``progress`` is called
    from this thread, in bytes; if it raises, the save stops.  Whatever is raised, no file is left, unless a ``journal`` is
    kept: then chunks that it names, and that still have their hash, are not computed again.
    Raises OutputError and DiskFullError.
    """
    layout = dict(checkpoint.specs)
    leaves: Leaves = {name: {} for name in layout}
    done, total = 0, layout_nbytes(layout)
    budget = Budget(budget_bytes)
    with (
        SafetensorsWriter(layout, folder, max_shard_bytes=max_shard_bytes, resume=journal is not None) as writer,
        threaded(threads) as spread,
    ):

        def report(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress("merging", done, total)

        def measuring(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
            jobs = list(jobs)

            def held(job: Any) -> Any:
                with budget.hold(most):
                    return work(job)

            for number, found in enumerate(spread(held, jobs), start=1):
                progress("measuring", number, len(jobs))
                yield found

        most = 0
        for window in windows(checkpoint):
            missing = [unit for unit in window if not kept(writer, unit, journal, leaves)]
            done += sum(unit_nbytes(checkpoint, unit) for unit in window) - sum(
                unit_nbytes(checkpoint, unit) for unit in missing
            )
            most = max((need_bytes(checkpoint, unit) for unit in missing), default=0)
            checkpoint.prepare(list(dict.fromkeys(span.name for unit in missing for span in unit)), measuring)
            for nbytes in spread(lambda unit: write_unit(checkpoint, writer, unit, leaves, journal, budget), missing):
                report(nbytes)
    return leaves


def save_file(checkpoint: Checkpoint, path: Path, *, threads: int = 2, progress: Progress = silent) -> Leaves:
    """``save_tensors`` as one file of any name, whole or not at all; it takes the place of one that is there."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        leaves = save_tensors(checkpoint, folder, max_shard_bytes=1 << 62, threads=threads, progress=progress)
        (Path(folder) / "model.safetensors").replace(path)
    return leaves


def write_unit(
    checkpoint: Checkpoint,
    writer: SafetensorsWriter,
    unit: Unit,
    leaves: Leaves,
    journal: Journal | None = None,
    budget: Budget | None = None,
) -> int:
    """Compute one unit, write it, and note its hashes; returns its bytes."""
    with (budget or Budget(float("inf"))).hold(need_bytes(checkpoint, unit)):
        flat = checkpoint.read_spans(unit)
        writer.write_spans(unit, flat)
        _hash(unit, flat, leaves)
    if journal is not None:
        note(journal, unit, leaves)
    return flat.numel() * flat.element_size()


def tensor_hashes(leaves: Leaves) -> dict[str, str]:
    """Each tensor's hash, of those of its leaves."""
    return {name: root_hash(found[at] for at in sorted(found)) for name, found in leaves.items()}


def tensor_norms(leaves: Leaves) -> dict[str, float]:
    """Each tensor's norm, of its leaves' sums of squares; 0 for integers."""
    return {name: math.sqrt(math.fsum(leaf.square for leaf in found.values())) for name, found in leaves.items()}


@contextmanager
def threaded(threads: int) -> Generator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]], None, None]:
    """A ``map`` on so many threads; what it has not begun is dropped when the body raises."""
    pool = ThreadPoolExecutor(threads, "eutectic")
    try:
        yield pool.map
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def windows(checkpoint: Checkpoint) -> Iterator[list[Unit]]:
    """All units in order, in runs of at least ``WINDOW`` elements that begin and end with a tensor."""
    window: list[Unit] = []
    held = 0
    for unit in units(checkpoint):
        if held >= WINDOW and unit[0].start == 0:
            yield window
            window, held = [], 0
        window.append(unit)
        held += sum(stop - start for _, start, stop in unit)
    yield window


def units(checkpoint: Checkpoint) -> Iterator[Unit]:
    """What is best computed at once: a chunk of a large tensor, or a run of small ones of one dtype."""
    run: Unit = []
    held = 0
    for name, spec in checkpoint.specs.items():
        n, grain = spec.numel, checkpoint.grain(name)
        small = n < LEAF and grain < LEAF
        if run and not (
            small and held + n <= CHUNK and len(run) < TOGETHER and spec.dtype == checkpoint.specs[run[0].name].dtype
        ):
            yield run
            run, held = [], 0
        if small:
            if n:
                run.append(Span(name, 0, n))
                held += n
            continue
        step = -(-max(CHUNK, grain) // LEAF) * LEAF
        yield from ([Span(name, start, min(start + step, n))] for start in range(0, n, step))
    if run:
        yield run


def need_bytes(checkpoint: Checkpoint, unit: Unit) -> int:
    """An upper bound of the memory that computing a unit takes."""
    return checkpoint.need_bytes(unit[0].name, sum(stop - start for _, start, stop in unit))


def unit_nbytes(checkpoint: Checkpoint, unit: Unit) -> int:
    """The bytes of a unit as written."""
    return sum(stop - start for _, start, stop in unit) * checkpoint.specs[unit[0].name].dtype.itemsize


def _entry(unit: Sequence[Span]) -> tuple[str, int, int]:
    """A unit's line in the journal: how it begins, and where its last tensor is left.  Equal layouts have equal units."""
    return unit[0].name, unit[0].start, unit[-1].stop


def kept(writer: SafetensorsWriter, unit: Unit, journal: Journal | None, leaves: Leaves) -> bool:
    """Whether an earlier run wrote a unit and it is whole; then its hashes are noted."""
    if journal is None or _entry(unit) not in journal.done:
        return False
    flat = torch.cat([writer.read_back(*span) for span in unit])
    noted: Leaves = {span.name: {} for span in unit}
    _hash(unit, flat, noted)
    if _root(unit, noted) != journal.done[_entry(unit)]:
        return False
    for name, start, stop in unit:
        writer.accept(name, stop - start)
        leaves[name] |= noted[name]
    return True


def note(journal: Journal, unit: Unit, leaves: Leaves) -> None:
    """Note in the journal that a unit is written, with the hash of its leaves."""
    journal.add(*_entry(unit), _root(unit, leaves))


def _root(unit: Unit, leaves: Leaves) -> str:
    return root_hash([leaves[name][leaf] for name, start, stop in unit for leaf in range(start // LEAF, -(-stop // LEAF))])


def _hash(unit: Unit, flat: Tensor, leaves: Leaves) -> None:
    """Add the hashes of a unit's leaves."""
    data, size, at = element_bytes(flat), flat.element_size(), 0
    for name, start, stop in unit:
        hashes = leaf_hashes(data[at * size : (at + stop - start) * size], size)
        parts = flat[at : (at := at + stop - start)].split(LEAF) if stop > start else ()
        found = [leaf._replace(square=_square(part)) for leaf, part in zip(hashes, parts, strict=True)]
        leaves[name].update(enumerate(found, start // LEAF))


def _square(x: Tensor) -> float:
    """Σ x² in float32 (float64 for float64), 0 for integers."""
    if not x.dtype.is_floating_point:
        return 0.0
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(x.float() if x.itemsize == 1 else x, dtype=wide)) ** 2
