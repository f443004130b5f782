"""safetensors files, single or sharded: the header is validated in full, tensors are read on demand.

A header is a stranger's claim about bytes; nothing is read, and nothing allocated, on the strength of a claim that has
not been checked against the file.  Reads are plain ``pread`` calls, so that they are thread-safe, and so that a file that
shrinks under us is an error message and not the SIGBUS of a memory map.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eutectic.checkpoint._files import AGAIN, MAX_JSON_BYTES, inside, parse_json, read_json
from eutectic.checkpoint.base import Checkpoint, Span, Turn
from eutectic.checkpoint.spec import DTYPES, Layout, TensorSpec
from eutectic.errors import CheckpointError, did_you_mean

#: PyTorch's own limits: elements are counted in int64, and views have at most 64 axes
_MAX_NUMEL, _MAX_AXES = 2**62, 64


class Entry(NamedTuple):
    """One tensor of a file: its spec, and where its bytes begin and end in the file."""

    spec: TensorSpec
    begin: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says of itself, checked against the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The validated header of a safetensors file.

    Raises CheckpointError, with the file and the tensor, unless the tensors fill the file exactly: no hole, no overlap,
    no byte missing or left over, each as long as its shape and dtype say.
    """
    fd = _open(Path(path))
    try:
        return _header(fd, Path(path))
    finally:
        os.close(fd)


class SafetensorsFile(Checkpoint):
    """One safetensors file.  Its header is read at once, its tensors on demand; the file is opened at the first read."""

    def __init__(self, path: str | Path) -> None:
        """Validate the header.  Raises CheckpointError as ``read_header`` does."""
        self._path = Path(path)
        self.origin, self.files, self.durable = str(path), (Path(path),), True
        fd = _open(self._path)
        try:
            self._entries, self.metadata = _header(fd, self._path)
            self._stamp = _stamp(fd)
        finally:
            os.close(fd)
        self._specs = {name: entry.spec for name, entry in self._entries.items()}
        self._lock = Turn()
        self._fd: int | None = None
        self._release: weakref.finalize | None = None
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens the file by itself; on another machine device and inode may be called otherwise."""
        here = {"_path": self._path.absolute(), "_stamp": self._stamp[-2:], "_fd": None, "_release": None}
        return self.__dict__ | here

    @property
    def specs(self) -> Layout:
        """Name → shape and dtype, in the header's order."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[name]
        return self._elements(entry.spec.dtype, entry.begin + start * entry.spec.dtype.itemsize, stop - start, name)

    def _elements(self, dtype: torch.dtype, begin: int, n: int, name: str) -> Tensor:
        buffer = torch.empty(n * dtype.itemsize, dtype=torch.uint8)
        _fill(self._descriptor(), buffer.numpy().data, begin, self._path, repr(name))
        # A byte that is neither 0 nor 1 is no bool: reading it as one would be undefined.
        return buffer.ne(0) if dtype is torch.bool else buffer.view(dtype)

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """As one read where the spans lie side by side in the file."""
        first = self._entries[spans[0].name]
        dtype, size = first.spec.dtype, first.spec.dtype.itemsize
        begin = at = first.begin + spans[0].start * size
        for name, start, stop in spans:
            if self._entries[name].begin + start * size != at:
                return super().read_spans(spans)
            at += (stop - start) * size
        return self._elements(dtype, begin, (at - begin) // size, f"{spans[0].name} to {spans[-1].name}")

    def _descriptor(self) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.origin}: read after close. Open it again.")
            if self._fd is None:
                fd = _open(self._path)
                if _stamp(fd)[-len(self._stamp) :] != self._stamp:
                    os.close(fd)
                    raise CheckpointError(f"{self.origin}: has changed since its header was read. Open it again.")
                self._fd, self._release = fd, weakref.finalize(self, os.close, fd)
            return self._fd

    def close(self) -> None:
        """Close the file; reading afterwards raises CheckpointError."""
        with self._lock:
            self._closed, self._fd = True, None
            if self._release is not None:
                self._release()


class Sharded(Checkpoint):
    """A checkpoint in several safetensors files, by its ``*.safetensors.index.json``."""

    def __init__(self, index: str | Path) -> None:
        """Validate the index and the header of every shard.

        Raises CheckpointError if a shard is missing, is not a safetensors file beside the index, or if index and shards
        do not name the same tensors.
        """
        index = Path(index)
        self.origin = str(index)
        self._shard_of = _weight_map(index)
        self._shards: dict[str, SafetensorsFile] = {}
        for file in dict.fromkeys(self._shard_of.values()):
            self._shards[file] = SafetensorsFile(_shard_path(index, file))
        _require_agreement(self._shard_of, self._shards, index)
        self._specs = {name: self._shards[file].specs[name] for name, file in self._shard_of.items()}
        self.durable = True
        self.files = (index, *(shard.files[0] for shard in self._shards.values()))

    @property
    def specs(self) -> Layout:
        """Name → shape and dtype, in the index's order."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._shards[self._shard_of[name]]._read(name, start, stop)

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """As the shard's, if they are in one."""
        file = self._shard_of[spans[0].name]
        if all(self._shard_of[span.name] == file for span in spans):
            return self._shards[file].read_spans(spans)
        return super().read_spans(spans)

    def close(self) -> None:
        """Close all shards; reading afterwards raises CheckpointError."""
        for shard in self._shards.values():
            shard.close()


# ── the index ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index}: 'weight_map' must map tensor names to file names. {AGAIN}")
    return found


def _shard_path(index: Path, file: str) -> Path:
    if file in ("", ".", "..") or any(char in file for char in "/\\\0"):
        raise CheckpointError(
            f"{index}: names the shard {file!r}, but a shard must be a plain file name beside the index. {AGAIN}"
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: names the shard {file!r}, which is no .safetensors file. Convert it to safetensors first."
        )
    path = inside(index.parent, file)
    if not path.exists():
        raise CheckpointError(f"{index}: its shard {file!r} is missing from {index.parent}. Download it.")
    return path


def _require_agreement(shard_of: dict[str, str], shards: dict[str, SafetensorsFile], index: Path) -> None:
    for name, file in shard_of.items():
        if name not in shards[file].specs:
            raise CheckpointError(f"{index}: says that {name!r} is in {file!r}, but it is not there. {AGAIN}")
    for file, shard in shards.items():
        for name in shard.specs:
            if shard_of.get(name) != file:
                raise CheckpointError(
                    f"{index}: the shard {file!r} holds {name!r}, which the index does not place there. {AGAIN}"
                )


# ── the header ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _header(fd: int, path: Path) -> Header:
    size = os.fstat(fd).st_size
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too short for a safetensors file, which begins with 8. {AGAIN}")
    length = int.from_bytes(_bytes(fd, 8, 0, path), "little")
    if length > MAX_JSON_BYTES or length > size - 8:
        raise CheckpointError(
            f"{path}: claims a header of {length} bytes; the file has {size}, and at most {MAX_JSON_BYTES} are read. "
            f"It is truncated, or no safetensors file. {AGAIN}"
        )
    found = parse_json(_bytes(fd, length, 8, path), f"{path}: the header")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' must map strings to strings. {AGAIN}")
    begin = 8 + length
    entries = {name: _entry(name, info, path, begin) for name, info in found.items()}
    _require_filled(entries, begin, size, path)
    return Header(entries, metadata)


def _entry(name: str, info: object, path: Path, data: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} has a name that is not Unicode text. {AGAIN}") from None
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise CheckpointError(f"{where} must have 'dtype', 'shape' and 'data_offsets'. {AGAIN}")
    dtype = info["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        advice = did_you_mean(dtype, DTYPES) if isinstance(dtype, str) else ""
        raise CheckpointError(f"{where} has the dtype {dtype!r}; accepted are {', '.join(DTYPES)}.{advice} Convert it first.")
    spec = TensorSpec(_shape(info["shape"], where), DTYPES[dtype])
    offsets = info["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)) or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: its data_offsets {str(offsets)[:99]} are not [begin, end] with 0 ≤ begin ≤ end. {AGAIN}"
        )
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise CheckpointError(f"{where} {spec} takes {spec.nbytes} bytes, but its data_offsets span {end - begin}. {AGAIN}")
    return Entry(spec, data + begin, data + end)


def _shape(shape: object, where: str) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: its shape {str(shape)[:99]} is not a list of integers ≥ 0. {AGAIN}")
    # Zeros count as ones: strides multiply all axes of an empty tensor too.
    numel = 1
    for axis in shape[: _MAX_AXES + 1]:
        numel = min(numel * min(max(axis, 1), _MAX_NUMEL + 1), _MAX_NUMEL + 1)
    if len(shape) > _MAX_AXES or numel > _MAX_NUMEL:
        raise CheckpointError(f"{where}: its shape {str(shape)[:99]} is larger than any tensor can be. {AGAIN}")
    return tuple(shape)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # not isinstance: a bool is no count


def _require_filled(entries: dict[str, Entry], begin: int, size: int, path: Path) -> None:
    """Refuse unless the tensors, in the order of their bytes, fill the file from ``begin`` to ``size``."""
    at, last = begin, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][1:]):
        if entry.begin < at:
            raise CheckpointError(
                f"{path}: tensor {name!r} overlaps {last}, which ends {at - entry.begin} bytes later. {AGAIN}"
            )
        if entry.begin > at:
            raise CheckpointError(
                f"{path}: a hole of {entry.begin - at} bytes lies between {last} and tensor {name!r}. {AGAIN}"
            )
        if entry.end > size:
            raise CheckpointError(f"{path}: truncated: tensor {name!r} ends at byte {entry.end} of {size}. {AGAIN}")
        at, last = entry.end, f"tensor {name!r}"
    if at < size:
        raise CheckpointError(f"{path}: {size - at} trailing bytes after {last} belong to no tensor. {AGAIN}")


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: a named pipe in a stranger's folder must not hang us before we see what it is.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: is not a regular file. Give the path of a .safetensors file.")
    return fd


def _stamp(fd: int) -> tuple[int, ...]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _bytes(fd: int, count: int, offset: int, path: Path) -> bytes:
    buffer = bytearray(count)
    _fill(fd, memoryview(buffer), offset, path, "the header")
    return bytes(buffer)


def _fill(fd: int, view: memoryview, offset: int, path: Path, what: str) -> None:
    """Read until ``view`` is full: one call may return less than was asked for."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path}: {what} cannot be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path}: shrank while being read: {what} ends {len(view) - done} bytes early. {AGAIN}")
        done += count
