"""Walking a checkpoint once, into files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.hashed import LEAF, leaf_hashes, root_hash
from eutectic.checkpoint.publish import Journal
from eutectic.checkpoint.spec import layout_nbytes
from eutectic.checkpoint.writer import MAX_SHARD_BYTES, SafetensorsWriter

#: Elements that one thread reads and writes at once.
CHUNK = 4 * LEAF


def save_tensors(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: Journal | None = None,
) -> dict[str, str]:
    """Write any checkpoint, chunk by chunk, as safetensors files into an existing folder; returns each tensor's hash.

    At most ``threads`` chunks of 1,048,576 elements are in memory.  ``progress(bytes_done, bytes_total)`` is called from this
    thread; if it raises, the save stops.  Whatever is raised, no file is left, unless a ``journal`` is kept: then chunks that
    it names, and that still have their hash, are not computed again.  Raises OutputError and DiskFullError.
    """
    layout = dict(checkpoint.specs)
    leaves: dict[str, dict[int, bytes]] = {name: {} for name in layout}
    done, total = 0, layout_nbytes(layout)
    with SafetensorsWriter(layout, folder, max_shard_bytes=max_shard_bytes, resume=journal is not None) as writer:

        def copy(chunk: tuple[str, int, int]) -> int:
            name, start, stop = chunk
            found = _kept(writer, chunk, journal)
            if found is None:
                flat = checkpoint.read_flat(name, start, stop)
                found = leaf_hashes(flat)
                writer.write(name, start, flat)
                if journal is not None:
                    journal.add(name, start, stop, root_hash(found))
            leaves[name].update(enumerate(found, start // LEAF))
            return (stop - start) * layout[name].dtype.itemsize

        pool = ThreadPoolExecutor(threads, "eutectic-save")
        try:
            for nbytes in pool.map(copy, _chunks(checkpoint)):
                done += nbytes
                progress(done, total)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return {name: root_hash([found[at] for at in sorted(found)]) for name, found in leaves.items()}


def _kept(writer: SafetensorsWriter, chunk: tuple[str, int, int], journal: Journal | None) -> list[bytes] | None:
    """The leaves of a chunk that an earlier run wrote, if it is whole."""
    if journal is None or chunk not in journal.done:
        return None
    found = leaf_hashes(writer.read_back(*chunk))
    if root_hash(found) != journal.done[chunk]:
        return None
    writer.accept(chunk[0], chunk[2] - chunk[1])
    return found


def _chunks(checkpoint: Checkpoint) -> Iterator[tuple[str, int, int]]:
    for name, spec in checkpoint.specs.items():
        step = -(-max(CHUNK, checkpoint.grain(name)) // LEAF) * LEAF
        for start in range(0, spec.numel, step):
            yield name, start, min(start + step, spec.numel)
