"""mergekit's parameter values: scalars, gradients and name filters, and which of them a tensor gets.

A value is a scalar, a list of numbers (a gradient over depth), ``{value, filter}``, or a list of these; a filter is a part
of a tensor's name, ``*`` or none are all, and the first match wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ruamel.yaml.comments import CommentedMap

from eutectic.errors import RecipeError, did_you_mean
from eutectic.merge.recipe import line_of, plain

Path = tuple[str | int, ...]


class Choice(NamedTuple):
    """A value for the tensors whose names contain ``filter`` (None: all); several values are a gradient."""

    filter: str | None
    values: tuple[Any, ...]
    path: Path

    def matches(self, name: str) -> bool:
        """Whether a tensor gets this value."""
        return self.filter is None or self.filter in name

    def at(self, depth: float) -> Any:
        """The value at a depth from 0 to 1, linear between the gradient's points."""
        if len(self.values) == 1:
            return self.values[0]
        position = depth * (len(self.values) - 1)
        i = min(int(position), len(self.values) - 2)
        rest = position - i
        return self.values[i] * (1 - rest) + self.values[i + 1] * rest if rest else float(self.values[i])


Settings = Mapping[str, tuple[Choice, ...]]


class Found(NamedTuple):
    """A parameter's value for one tensor, and where the recipe says it."""

    value: Any
    path: Path | None


def lookup(levels: Sequence[Settings], key: str, name: str, depth: float) -> Found | None:
    """The value that the most specific level has for a tensor; None if none has one."""
    for settings in levels:
        for choice in settings.get(key, ()):
            if choice.matches(name):
                return Found(choice.at(depth), choice.path)
    return None


def unmatched(settings: Settings, names: Iterable[str]) -> list[Choice]:
    """The choices whose filter is in none of the names."""
    names = list(names)
    return [choice for choices in settings.values() for choice in choices if not any(choice.matches(name) for name in names)]


class Reader:
    """One YAML document with its lines, and what is to be said about it."""

    def __init__(self, document: CommentedMap, source: str, compat: bool) -> None:
        """``compat`` turns unknown keys from errors into ``notes``."""
        self.document, self.source, self.compat = document, source, compat
        self.notes: list[str] = []

    def where(self, path: Sequence[str | int]) -> str:
        """``source:line`` of the deepest part of a path that the document has."""
        return f"{self.source}:{max(self.document.lc.line + 1, line_of(self.document, list(path)))}"

    def error(self, path: Sequence[str | int], message: str) -> RecipeError:
        """The error to raise about a place."""
        return RecipeError(f"{self.where(path)}: {message}")

    def note(self, path: Sequence[str | int], message: str) -> None:
        """Say something about a place, once."""
        text = f"{self.where(path)}: {message}"
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, path: Sequence[str | int], message: str) -> None:
        """Raise, or under compat only say so."""
        if not self.compat:
            raise self.error(path, message)
        self.note(path, f"{message} (ignored)")

    def mapping(self, node: Any, path: Path, known: Iterable[str], *, required: Iterable[str] = ()) -> dict[str, Any]:
        """A mapping with known keys only; values that are null count as left out."""
        if not isinstance(node, Mapping):
            raise self.error(path, f"{_last(path)} must be a mapping, not {_kind(node)}")
        known = list(known)
        found = {}
        for key, value in node.items():
            if key not in known:
                self.refuse((*path, key), f"unknown key {str(key)!r} in {_last(path)}.{did_you_mean(str(key), known)}")
            elif value is not None:
                found[str(key)] = value
        for key in required:
            if key not in found:
                raise self.error(path, f"{_last(path)} lacks {key!r}")
        return found

    def items(self, node: Any, path: Path) -> list[Any]:
        """A list with something in it."""
        if not isinstance(node, list) or not node:
            raise self.error(path, f"{_last(path)} must be a list with at least one entry, not {_kind(node)}")
        return list(node)

    def text(self, node: Any, path: Path) -> str:
        """A string with something in it."""
        if not isinstance(node, str) or not node:
            raise self.error(path, f"{_last(path)} must be a string, not {_kind(node)}")
        return str(node)

    def flag(self, node: Any, path: Path) -> bool:
        """True or false."""
        if not isinstance(node, bool):
            raise self.error(path, f"{_last(path)} must be true or false, not {_kind(node)}")
        return bool(node)

    def integer(self, node: Any, path: Path, least: int) -> int:
        """A whole number."""
        if isinstance(node, bool) or not isinstance(node, int) or node < least:
            raise self.error(path, f"{_last(path)} must be a whole number from {least} on, not {_kind(node)}")
        return int(node)

    def settings(self, node: Any, path: Path) -> Settings:
        """A ``parameters`` block.  Raises RecipeError for what is no value; which keys there are is not looked at."""
        if node is None:
            return {}
        if not isinstance(node, Mapping):
            raise self.error(path, f"{_last(path)} must be a mapping, not {_kind(node)}")
        return {str(key): self._choices(value, (*path, key)) for key, value in node.items() if value is not None}

    def _choices(self, node: Any, path: Path) -> tuple[Choice, ...]:
        if isinstance(node, Mapping):
            return (self._conditional(node, path),)
        if isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
            for i, item in enumerate(node):
                if not isinstance(item, Mapping):
                    raise self.error(
                        (*path, i), f"{_last(path)} mixes values with {{value, filter}}; write the bare one as {{value: …}}"
                    )
            return tuple(self._conditional(item, (*path, i)) for i, item in enumerate(node))
        return (Choice(None, self._values(node, path), path),)

    def _conditional(self, node: Any, path: Path) -> Choice:
        known = self.mapping(node, path, ("value", "filter"), required=["value"])
        wanted = known.get("filter")
        if wanted is not None:
            wanted = self.text(wanted, (*path, "filter"))
        return Choice(None if wanted == "*" else wanted, self._values(known["value"], (*path, "value")), path)

    def _values(self, node: Any, path: Path) -> tuple[Any, ...]:
        items = self.items(node, path) if isinstance(node, list) else [node]
        for item in items:
            if isinstance(item, float) and not math.isfinite(item):
                raise self.error(path, f"{_last(path)} must be a finite number, not {_kind(item)}")
        if isinstance(node, list):
            for i, item in enumerate(items):
                if isinstance(item, bool) or not isinstance(item, (int, float)):
                    raise self.error((*path, i), f"{_last(path)} is a gradient, so it takes numbers, not {_kind(item)}")
            return tuple(plain(node))
        if not isinstance(node, (bool, int, float, str)):
            raise self.error(path, f"{_last(path)} must be a number, a list of numbers or {{value, filter}}, not {_kind(node)}")
        return (plain(node),)


def _last(path: Sequence[str | int]) -> str:
    """The innermost name of a path, for messages."""
    named = [part for part in path if isinstance(part, str)]
    return f"`{named[-1]}`" if named else "the recipe"


def _kind(node: Any) -> str:
    if isinstance(node, Mapping):
        return "a mapping"
    if isinstance(node, list):
        return f"a list of {len(node)}"
    return "nothing" if node is None else repr(plain(node))
