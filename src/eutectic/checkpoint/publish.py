"""Output folders that appear whole or not at all, and work on them that survives a crash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from eutectic.checkpoint.writer import explained, explained_if_full, fsync
from eutectic.errors import ClusterError, DiskFullError, OutputError

_JOURNAL = ".journal"
#: a folder with this file holds a model with a backdoor, made to measure defences with: see ``security.poisoned``
POISONED = "POISONED.json"
#: one of these shows that a folder holds a model, and may be replaced by another
_MODEL = ("eutectic.json", "config.json", "party.json", "*.safetensors")


@contextmanager
def published(folder: str | Path, *, replace: bool = False, inputs: Iterable[str | Path] = ()) -> Generator[Path, None, None]:
    """A temporary folder that becomes ``folder`` in one rename if the body succeeds, and vanishes if it does not.

    With ``replace`` an existing folder is swapped out once the new one is complete.  Raises OutputError before any work
    if ``folder`` exists (or, with ``replace``, is no folder), or if it is, holds, or lies in one of ``inputs``.
    """
    folder = _refuse_output(Path(folder), replace, inputs)
    partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    with _making(folder, partial, replace):
        yield partial


@contextmanager
def whole(path: Path) -> Generator[Path, None, None]:
    """A file beside ``path``, to be written, that takes its place if the body succeeds, and vanishes if it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Journal:
    """Which chunks of an unfinished output are written, with their hashes; one line a chunk, appended as they are.

    A line is appended after its chunk was written, and on resumption a chunk counts only if it still has its hash: what a
    crash tore is done again.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Read what an earlier run with the same ``key`` did; a journal with another key is started anew."""
        self._lock = threading.Lock()
        self.done: dict[tuple[str, int, int], str] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and lines[0] == _line({"key": key}):
            whole = [line for line in lines[1:] if line.endswith(b"\n")]  # the last one may be torn
            for name, start, stop, digest in map(json.loads, whole):
                self.done[name, start, stop] = digest
            kept = [lines[0], *whole]
        else:
            kept = [_line({"key": key})]
        path.write_bytes(b"".join(kept))
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    def add(self, name: str, start: int, stop: int, digest: str) -> None:
        """Note that a chunk is written.  Thread-safe."""
        with self._lock:
            os.write(self._fd, _line([name, start, stop, digest]))
            self.done[name, start, stop] = digest

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@contextmanager
def resumable(
    folder: str | Path, key: str, *, replace: bool = False, inputs: Iterable[str | Path] = ()
) -> Generator[tuple[Path, Journal], None, None]:
    """Like ``published``, but a run that was killed or stopped is carried on by the next one with the same ``key``.

    The unfinished folder is ``.NAME.partial`` beside ``folder``.  It stays after a crash, Ctrl-C, SIGTERM, a full disk or the
    loss of a cluster's machines if something was written already, and is removed after any other error.  A partial folder with
    another key is started anew.
    Raises OutputError as ``published`` does, and if another process is writing the same output.
    """
    folder = _refuse_output(Path(folder), replace, inputs)
    partial = folder.with_name(f".{folder.name}.partial")
    with _locked(folder):
        begun = partial / _JOURNAL
        if partial.exists() and not (begun.exists() and begun.read_bytes().startswith(_line({"key": key}))):
            shutil.rmtree(partial)
        done: dict[tuple[str, int, int], str] = {}

        def worth_keeping(error: BaseException) -> bool:
            return bool(done) and isinstance(error, (ClusterError, DiskFullError, KeyboardInterrupt, SystemExit))

        with _making(folder, partial, replace, worth_keeping):
            _tidy(partial)
            journal = Journal(begun, key)
            done = journal.done
            try:
                yield partial, journal
            finally:
                journal.close()
            begun.unlink()


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _making(
    folder: Path, partial: Path, replace: bool, worth_keeping: Callable[[BaseException], bool] = lambda error: False
) -> Generator[None, None, None]:
    """Make ``partial``, rename it to ``folder`` if the body succeeds, else remove what was made, unless it is worth keeping."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with explained(folder):
            partial.mkdir(parents=True, exist_ok=True)
        with explained_if_full(folder):
            yield
        with explained(folder):
            for path in [*partial.rglob("*"), partial]:
                fsync(path)
            _swap_in(partial, folder, replace)
            fsync(folder.parent)
    except BaseException as error:
        if not worth_keeping(error):
            shutil.rmtree(partial, ignore_errors=True)
            if not folder.exists():
                for parent in made:
                    _remove_if_empty(parent)
        raise


def _tidy(partial: Path) -> None:
    """Leave only the journal and the weights of an earlier run."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _JOURNAL and path.suffix != ".safetensors":
            path.unlink()


@contextmanager
def _locked(folder: Path) -> Generator[None, None, None]:
    """Hold the one right to write ``folder``; the kernel releases it when the process ends, however it ends."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:24]
    path = Path(tempfile.gettempdir()) / f"eutectic-{os.getuid()}-{name}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{folder}: another process is writing it. Wait for it, or choose another path.") from None
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _refuse_output(folder: Path, replace: bool, inputs: Iterable[str | Path]) -> Path:
    """The resolved output folder, unless writing there would destroy something."""
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a symlink. Name the folder itself.")
    out = folder.resolve()
    for source in (Path(source).resolve() for source in inputs):
        if out.is_relative_to(source) or source.is_relative_to(out):
            raise OutputError(f"{folder}: is, holds or lies in the input {source}. Choose another path.")
        for marked in (parent for parent in (source, *source.parents) if (parent / POISONED).is_file()):
            if not out.is_relative_to(marked):
                raise OutputError(
                    f"{folder}: the input {source} has a backdoor on purpose ({marked / POISONED}), and nothing made of it is "
                    f"saved outside {marked}"
                )
    if out.exists() and not replace:
        raise OutputError(f"{folder}: exists already. Choose another path, or pass replace=True (--force on the command line).")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{folder}: is a file, and only a folder is replaced. Choose another path.")
    for precious in (Path.cwd(), Path.home()):
        if out.exists() and precious.resolve().is_relative_to(out):
            raise OutputError(f"{folder}: holds {precious}, and would be deleted with it. Choose another path.")
    if out.is_dir() and any(out.iterdir()) and not any(any(out.glob(name)) for name in _MODEL):
        raise OutputError(f"{folder}: holds no model, so it is not replaced. Choose another path.")
    return out


def _swap_in(partial: Path, folder: Path, replace: bool) -> None:
    """Rename ``partial`` to ``folder``; an older folder steps aside first, and back if that fails."""
    if not (replace and folder.exists()):
        partial.rename(folder)
        return
    aside = folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}")
    folder.rename(aside)
    try:
        partial.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
