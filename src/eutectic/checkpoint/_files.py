"""Reading what a stranger wrote: JSON without surprises, and names that stay inside their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eutectic.errors import CheckpointError

#: no honest header, index or config comes near; a longer one is refused before it is read
MAX_JSON_BYTES = 100_000_000
AGAIN = "Download or export it again."


def parse_json(data: bytes, origin: str) -> dict[str, Any]:
    """The JSON object in ``data``.

    Raises CheckpointError if it is not UTF-8, not JSON, not an object, nested beyond reason, or if a key comes twice
    (two readers might then each believe another one).
    """
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not a JSON object in UTF-8: {error}. {AGAIN}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{origin} is not a JSON object but a {type(found).__name__}. {AGAIN}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.  Raises CheckpointError, with the path, if there is none to be had."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file. {AGAIN}")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read. {AGAIN}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_json(data, str(path))


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, once it is sure that no ``..`` and no symlink leads out of the folder.

    One kind of link is at home: in a Hugging Face cache, ``snapshots/<revision>/`` links into its ``blobs/``.
    Raises CheckpointError for anything else.
    """
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL in the name
        raise CheckpointError(f"{folder}: {name!r} is no usable path: {error}") from None
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    if not (real.is_relative_to(root) or in_cache):
        raise CheckpointError(
            f"{folder}: {name!r} leads out of its folder, to {real}. Put the file itself there, or open {real} by its own path."
        )
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found
