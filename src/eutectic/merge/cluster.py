"""The same merge on the machines of a Ray cluster (extra ``cluster``), to the same bits.

The driver makes the output's files at their full size.  A task gets a run of whole tensors, measures what it needs of them,
merges them and writes them in place; only hashes come back, and the driver notes them in its journal.  What is measured over
the whole model comes first, in tasks too, and goes to all of them.  A task whose worker is lost runs again: it writes the same
bytes to the same place.  Inputs and output lie on a disk that all machines share.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from eutectic import record
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.hashed import Hashed, Leaves
from eutectic.checkpoint.publish import Journal
from eutectic.checkpoint.save import Progress, Unit, kept, note, silent, unit_nbytes, units, write_unit
from eutectic.checkpoint.spec import layout_nbytes
from eutectic.checkpoint.writer import MAX_SHARD_BYTES, SafetensorsWriter
from eutectic.errors import BudgetError, CheckpointError, ClusterError, EutecticError, MissingDependencyError
from eutectic.merge._memory import keep_freed_memory
from eutectic.merge.compose import Composed
from eutectic.merge.plan import plan
from eutectic.merge.view import Merged
from eutectic.methods._threads import one_torch_thread

#: tasks for each processor, and what one writes at most (if tensors are no larger): so much is lost with a worker
SHARE, TASK_BYTES = 4, 1 << 30
#: how often a task is begun again if its worker is lost
RETRIES = 8

Work = Callable[[Any], Any]


def save_tensors(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    address: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int | None = None,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Leaves:
    """As ``checkpoint.save.save_tensors``, for a merge of files that are ``Hashed``, on the cluster at ``address``.

    ``address`` is Ray's: ``auto`` for the cluster that this machine belongs to, ``local`` for one that ends with this call.  A
    process that is connected already stays so.  Each task takes one processor and at most ``memory_bytes``, see ``plan``.
    Raises CheckpointError for other inputs, MissingDependencyError, ClusterError, BudgetError, OutputError, DiskFullError.
    """
    if not isinstance(checkpoint, (Merged, Composed)) or not all(model.files for model in checkpoint.inputs.values()):
        raise CheckpointError(f"{checkpoint.origin}: a cluster merges models that are files. Save the inputs first")
    needed_bytes = plan(checkpoint, memory_bytes, 1).peak_bytes
    leaves: Leaves = {name: {} for name in checkpoint.specs}
    with (
        SafetensorsWriter(checkpoint.specs, folder, max_shard_bytes=max_shard_bytes, resume=journal is not None) as writer,
        _connected(address) as ray,
    ):
        missing = [unit for unit in units(checkpoint) if not kept(writer, unit, journal, leaves)]
        total = layout_nbytes(checkpoint.specs)
        done = total - sum(unit_nbytes(checkpoint, unit) for unit in missing)
        with _Cluster(ray, checkpoint, memory_bytes, needed_bytes) as cluster:
            if missing:
                checkpoint.prepare([], functools.partial(cluster.measured, progress))
            groups = _groups(checkpoint, missing, cluster.tasks)
            write = functools.partial(_write, checkpoint, Path(folder).absolute(), max_shard_bytes)
            for at, (found,) in cluster.results(write, [[group] for group in groups]):
                for name, hashes in found.items():
                    leaves[name].update(hashes)
                for unit in groups[at]:
                    for name, start, stop in unit:
                        writer.accept(name, stop - start)
                    if journal is not None:
                        note(journal, unit, leaves)
                    done += unit_nbytes(checkpoint, unit)
                progress("merging", done, total)
    return leaves


def _groups(checkpoint: Checkpoint, missing: Sequence[Unit], tasks: int) -> list[list[Unit]]:
    """Runs of units for so many tasks, much the same in bytes, that begin and end with a tensor; the largest ones first."""
    size = functools.partial(unit_nbytes, checkpoint)
    share, held = min(sum(map(size, missing)) / tasks, TASK_BYTES), 0
    groups: list[list[Unit]] = []
    for unit in missing:
        if not groups or (held >= share and unit[0].name != groups[-1][-1][-1].name):
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += size(unit)
    return sorted(groups, key=lambda group: -sum(map(size, group)))


# ── on the driver ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Cluster:
    """Tasks over one merge.  What is not done when the body ends is called off."""

    def __init__(self, ray: Any, checkpoint: Merged | Composed, memory_bytes: int | None, needed_bytes: int) -> None:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = int(max((node.get("memory", 0) for node in alive), default=0))
        if needed_bytes > most:
            raise BudgetError(
                f"a task takes up to {needed_bytes >> 20} MiB, and no machine of the cluster has more than {most >> 20} MiB"
            )
        self.tasks = SHARE * max(1, int(sum(node.get("CPU", 0) for node in alive)))
        self._ray, self._checkpoint, self._memory_bytes = ray, checkpoint, memory_bytes
        self._run = ray.remote(num_cpus=1, memory=needed_bytes, max_retries=RETRIES)(_run)
        self._pending: dict[Any, int] = {}

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for ref in self._pending:
            self._ray.cancel(ref, force=True)

    def results(self, work: Work, parts: Sequence[Sequence[Any]]) -> Iterator[tuple[int, list[Any]]]:
        """What ``work`` makes of the items of each part, and the part's number, as they get ready."""
        errors = self._ray.exceptions
        job = self._ray.put(Job(self._checkpoint, work, self._memory_bytes, record.versions(record.ENGINE)))
        self._pending = {self._run.remote(job, part): number for number, part in enumerate(parts)}
        while self._pending:
            (ref,), _ = self._ray.wait(list(self._pending), num_returns=1)
            number = self._pending.pop(ref)
            try:
                found, passed = self._ray.get(ref)
            except errors.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, EutecticError) else error) from None
            except errors.RayError as error:
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ClusterError(f"the worker of a task was lost {1 + RETRIES} times, or none can be had: {line}") from None
            for name, leaves in passed.items():
                source = self._checkpoint.inputs[name]
                if isinstance(source, Hashed):
                    source.absorb(leaves)
            yield number, found

    def measured(self, progress: Progress, work: Work, jobs: Iterable[Any]) -> Iterator[Any]:
        """A ``map`` in tasks."""
        jobs = list(jobs)
        size = max(1, -(-len(jobs) // self.tasks))
        early: dict[int, list[Any]] = {}
        done = turn = 0
        for number, found in self.results(work, [jobs[at : at + size] for at in range(0, len(jobs), size)]):
            progress("measuring", done := done + len(found), len(jobs))
            early[number] = found
            while turn in early:
                yield from early.pop(turn)
                turn += 1


@contextmanager
def _connected(address: str) -> Generator[Any, None, None]:
    """Ray, connected; if it was not before, it is not afterwards."""
    try:
        import ray
    except ImportError:
        raise MissingDependencyError("merging on a cluster needs Ray: pip install 'eutectic[cluster]'") from None
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"{address}: no Ray cluster answers: {str(error).rstrip('.')}. `ray start --head` begins one"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


# ── on a worker ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Job(NamedTuple):
    """What the tasks of a pass have in common; ``work`` is over the ``checkpoint``, or a part of it."""

    checkpoint: Merged | Composed
    work: Work
    memory_bytes: int | None
    versions: Mapping[str, str]


def _run(job: Job, items: Sequence[Any]) -> tuple[list[Any], dict[str, Leaves]]:
    """What the work makes of the items, and the hashes of what was read for them, by input."""
    here = record.versions(record.ENGINE)
    for name in here.keys() & job.versions.keys():
        if here[name] != job.versions[name]:
            raise ClusterError(
                f"{socket.gethostname()}: has {name} {here[name]}, where the merge was begun is {job.versions[name]}; "
                "results would differ. Use one version everywhere"
            )
    keep_freed_memory()
    with one_torch_thread(), job.checkpoint:
        plan(job.checkpoint, job.memory_bytes, 1)  # whether it fits beside what this process has
        found = [job.work(item) for item in items]
        passed = {name: source.noted() for name, source in job.checkpoint.inputs.items() if isinstance(source, Hashed)}
    return found, passed


def _write(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int, group: Sequence[Unit]) -> Leaves:
    """Measure, merge and write some units; returns their hashes."""
    leaves: Leaves = {span.name: {} for unit in group for span in unit}
    with SafetensorsWriter(checkpoint.specs, folder, max_shard_bytes=max_shard_bytes, only=leaves) as writer:
        checkpoint.prepare(list(leaves))
        for unit in group:
            write_unit(checkpoint, writer, unit, leaves)
    return leaves
