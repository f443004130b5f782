"""Writing safetensors: files of known size, filled in place and in any order."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from eutectic.checkpoint.base import Span, element_bytes
from eutectic.checkpoint.spec import DTYPE_NAMES, Layout, TensorSpec, layout_nbytes
from eutectic.errors import DiskFullError, OutputError, did_you_mean

MAX_SHARD_BYTES = 5_000_000_000
#: the data of a file begin at a multiple of this, so that a reader may map pages, and any dtype is aligned
_ALIGN = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENODEV}


class SafetensorsWriter:
    """The files of one layout, at their full size from the start; chunks of tensors are written in any order.

    As a context manager it finishes at the end, or removes its files if the body raises; with ``resume`` it leaves them,
    and takes up files that an earlier run left.  With ``only`` it is a helper of the writer that made the files: it opens those
    of these tensors, and neither makes, finishes nor removes any.
    """

    def __init__(
        self,
        layout: Layout,
        folder: str | Path,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        resume: bool = False,
        only: Collection[str] | None = None,
    ) -> None:
        """Create the files: ``model.safetensors``, or shards of at most ``max_shard_bytes`` (if tensors are no larger).

        Raises DiskFullError if they have no room, and OutputError if they exist, if a tensor cannot be stored, or if with
        ``only`` they are not there.
        """
        self._folder = Path(folder)
        self._resume, self._only = resume, only
        self._layout = dict(layout)
        self._shards = plan_shards(layout, max_shard_bytes, {"format": "pt"} if metadata is None else metadata)
        self._shard_of = {name: shard for shard in self._shards for name in shard.begins}
        self._written = dict.fromkeys(self._layout, 0)
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}
        self._made: list[Path] = []
        if only is None:
            there = sum(path.stat().st_size for shard in self._shards if (path := self._folder / shard.file).exists())
            require_space(self._folder, sum(shard.nbytes for shard in self._shards) - there)
        try:
            for shard in self._shards:
                if only is None:
                    self._create(shard)
                elif not shard.begins.keys().isdisjoint(only):
                    self._open(shard)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Store ``tensor`` as the elements of ``name`` from the flat position ``start`` on.  Thread-safe.

        Raises OutputError for an unknown name, another dtype or elements beyond the end, DiskFullError if there is no room.
        """
        self.write_spans([Span(name, start, start + tensor.numel())], tensor)

    def write_spans(self, spans: Sequence[Span], tensor: Tensor) -> None:
        """Store ``tensor`` as parts of tensors of one dtype, end to end: as one write where they lie side by side.

        Thread-safe; raises as ``write`` does.
        """
        flat, size, at = tensor.detach().to("cpu").reshape(-1), tensor.element_size(), 0
        runs: list[tuple[Shard, int, int, int]] = []  # shard, where its bytes begin, elements first and last
        for span in spans:
            shard, offset = self._place(span, tensor)
            last = at + span.stop - span.start
            if runs and runs[-1][0] is shard and runs[-1][1] + (at - runs[-1][2]) * size == offset:
                runs[-1] = (*runs[-1][:3], last)
            else:
                runs.append((shard, offset, at, last))
            at = last
        for shard, offset, first, last in runs:
            self._write(shard, element_bytes(flat[first:last]), offset)
        with self._lock:
            for name, start, stop in spans:
                self._written[name] += stop - start

    def _place(self, span: Span, tensor: Tensor) -> tuple[Shard, int]:
        """The file of a span and where in it the span begins."""
        name, start, stop = span
        if name not in self._layout:
            raise OutputError(f"{self._folder}: no tensor {name!r} in the layout.{did_you_mean(name, self._layout)}")
        spec, shard = self._layout[name], self._shard_of[name]
        if tensor.dtype != spec.dtype or not 0 <= start <= stop <= spec.numel:
            chunk = TensorSpec((stop - start,), tensor.dtype)
            raise OutputError(f"{self._folder}: a chunk {chunk} at {start} does not fit into {name!r} {spec}")
        if shard.file not in self._fds:
            raise OutputError(f"{self._folder / shard.file}: {name!r} written after the file was closed")
        return shard, shard.begins[name] + start * spec.dtype.itemsize

    def finish(self) -> None:
        """Put everything on the disk, write the index if there are shards, and close.

        Raises OutputError if a tensor was not written in full.
        """
        for name, spec in self._layout.items():
            if self._fds and self._only is None and self._written[name] < spec.numel:
                raise OutputError(
                    f"{self._folder}: only {self._written[name]} of {spec.numel} elements of {name!r} were written"
                )
        for shard in self._shards:
            if shard.file in self._fds:
                with explained(self._folder / shard.file, shard.nbytes):
                    os.fsync(self._fds[shard.file])
        if len(self._shards) > 1 and self._fds and self._only is None:
            self._write_index()
        self._close()

    def read_back(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` as they stand in the file."""
        spec, shard = self._layout[name], self._shard_of[name]
        at, size = shard.begins[name] + start * spec.dtype.itemsize, (stop - start) * spec.dtype.itemsize
        with explained(self._folder / shard.file):
            return torch.frombuffer(bytearray(os.pread(self._fds[shard.file], size, at)), dtype=spec.dtype)

    def accept(self, name: str, elements: int) -> None:
        """Count elements as written that an earlier run wrote."""
        with self._lock:
            self._written[name] += elements

    def discard(self) -> None:
        """Close, and remove all files of this writer that it may not leave for a later run."""
        self._close()
        if not self._resume:
            for path in self._made:
                path.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        """Use as a context manager to finish, or discard, at the end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish, or remove the files if the body raised."""
        try:
            if kind is None:
                self.finish()
                return
        except BaseException:
            self.discard()
            raise
        self.discard()

    def _create(self, shard: Shard) -> None:
        path = self._folder / shard.file
        with explained(path, shard.nbytes):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if self._resume else os.O_EXCL), 0o666)
            self._fds[shard.file] = fd
            self._made.append(path)
            os.ftruncate(fd, shard.nbytes)
            _reserve(fd, shard.nbytes)
        self._write(shard, memoryview(shard.header), 0)

    def _open(self, shard: Shard) -> None:
        path = self._folder / shard.file
        if not path.exists():
            raise OutputError(f"{path}: is not there. Several machines write into a folder only on a disk that they all share.")
        with explained(path):
            self._fds[shard.file] = os.open(path, os.O_RDWR)

    def _write(self, shard: Shard, view: memoryview, offset: int) -> None:
        done = 0
        with explained(self._folder / shard.file, shard.nbytes):
            while done < len(view):  # one call may write less than was asked for
                done += os.pwrite(self._fds[shard.file], view[done:], offset + done)

    def _write_index(self) -> None:
        path = self._folder / "model.safetensors.index.json"
        index = {
            "metadata": {"total_size": layout_nbytes(self._layout)},
            "weight_map": {name: self._shard_of[name].file for name in self._layout},
        }
        with explained(path):
            self._made.append(path)
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            fsync(path)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def require_space(path: str | Path, needed_bytes: int) -> None:
    """Raise DiskFullError if the disk of ``path`` (which need not exist yet) has fewer free bytes than needed."""
    free = free_bytes(Path(path))
    if free < needed_bytes:
        raise DiskFullError(f"{path}: no room: {needed_bytes} bytes are needed, {free} are free. {_MAKE_ROOM}")


# ── where each tensor goes ────────────────────────────────────────────────────────────────────────────────────────────


class Shard(NamedTuple):
    """One file to be: its name, its header (8-byte length included), where each tensor begins, and its whole size."""

    file: str
    header: bytes
    begins: dict[str, int]
    nbytes: int


def plan_shards(layout: Layout, max_shard_bytes: int, metadata: Mapping[str, str]) -> list[Shard]:
    """The files of a layout, its tensors in order.  Raises OutputError if a tensor cannot be stored in safetensors."""
    for name, spec in layout.items():
        if spec.dtype not in DTYPE_NAMES:
            raise OutputError(f"tensor {name!r} has the dtype {spec.dtype}, which is not stored. Cast it first.")
        if name == "__metadata__" or name.encode(errors="replace").decode() != name:
            raise OutputError(f"{name!r} cannot be the name of a tensor in safetensors. Rename it first.")
    if max_shard_bytes < 1:
        raise OutputError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    groups = _split(layout, max_shard_bytes)
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = ["model.safetensors"]
    return [_shard(file, {name: layout[name] for name in group}, metadata) for file, group in zip(files, groups, strict=True)]


def _split(layout: Layout, max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    used = 0
    for name, spec in layout.items():
        if groups[-1] and used + spec.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += spec.nbytes
    return groups


def _shard(file: str, layout: Layout, metadata: Mapping[str, str]) -> Shard:
    # Wide dtypes come first: a float32 after three bytes of bool would be misaligned, and readers that map files refuse it.
    at, begins = 0, {}
    for name, spec in sorted(layout.items(), key=lambda item: -item[1].dtype.itemsize):
        begins[name] = at
        at += spec.nbytes
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, spec in layout.items():
        offsets = [begins[name], begins[name] + spec.nbytes]
        entries[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + at)


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_MAKE_ROOM = "Free some space, or choose another disk."


@contextmanager
def explained(path: Path, needed_bytes: int = 0) -> Generator[None, None, None]:
    """Turn an operating system's error into ours: OutputError, or DiskFullError if there is no room."""
    try:
        with explained_if_full(path, needed_bytes):
            yield
    except FileExistsError:
        raise OutputError(f"{path}: exists already. Choose another path.") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def explained_if_full(path: Path, needed_bytes: int = 0) -> Generator[None, None, None]:
    """Only turn "no room" into ours: in a caller's code, other errors are the caller's."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        needed = f"{needed_bytes} bytes are needed, " if needed_bytes else ""
        free = free_bytes(path)
        raise DiskFullError(f"{path}: no room ({error.strerror}): {needed}{free} are free. {_MAKE_ROOM}") from None


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist yet."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _reserve(fd: int, nbytes: int) -> None:
    """Claim the file's blocks, so that a full disk shows before the work and not at its end."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
            return
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
    os.ftruncate(fd, nbytes)


def fsync(path: Path) -> None:
    """Put a file, or a folder's list of names, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
