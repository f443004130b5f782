"""Name → object.  Built-ins are found by file name, without importing them; third parties by entry point.

A built-in method ``ties`` is the function ``ties`` in ``eutectic/methods/ties.py``.  A package adds its own with

    [project.entry-points."eutectic.methods"]
    my_method = "my_package.my_module:my_method"

A name that two origins claim is an error; it never wins silently.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from eutectic.errors import UnknownNameError, did_you_mean

#: the rooms that have methods: closed forms, what is fitted or keeps its experts, and what combines predictions
ROOMS = ("methods", "fusion", "ensemble")
#: the folders of a room, where it has others than its own
FOLDERS = {"fusion": ("fusion", "security/defences")}


@functools.cache
def names(room: str) -> dict[str, str]:
    """All registered names of a room (``"methods"``, ``"fusion"`` …) → ``module:attribute``, in alphabetical order.

    Raises UnknownNameError if two origins claim one name.
    """
    found: dict[str, str] = {}
    for folder in FOLDERS.get(room, (room,)):
        own = (path.stem for path in (Path(__file__).parent / folder).glob("*.py") if path.stem[0] != "_")
        found |= {stem: f"eutectic.{folder.replace('/', '.')}.{stem}:{stem}" for stem in own}
    for point in metadata.entry_points(group=f"eutectic.{room}"):
        if point.name in found:
            raise UnknownNameError(f"two origins claim the {room} name {point.name!r}: {found[point.name]} and {point.value}")
        found[point.name] = point.value
    return dict(sorted(found.items()))


def defences() -> list[str]:
    """The names of fusions that defend a merge, in alphabetical order: those of the room of safety."""
    return [name for name, where in names("fusion").items() if where.startswith("eutectic.security.")]


def room_of(name: str) -> str:
    """The room that has a method: ``methods``, ``fusion`` or ``ensemble``.  Raises UnknownNameError."""
    known = {known: room for room in ROOMS for known in names(room)}
    if name not in known:
        raise UnknownNameError(f"no method is called {name!r}.{did_you_mean(name, known)}")
    return known[name]


def get(room: str, name: str) -> Callable[..., Any]:
    """The registered object.  Raises UnknownNameError with the nearest name."""
    known = names(room)
    if name not in known:
        raise UnknownNameError(f"no {room.removesuffix('s')} is called {name!r}.{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def module(room: str, name: str) -> ModuleType:
    """The module that defines the object; its constants (``REFERENCE``, ``GRID``) describe it."""
    found = inspect.getmodule(get(room, name))
    if found is None:
        raise UnknownNameError(f"{name!r} is not defined in a module")
    return found


def reference(room: str, name: str) -> str:
    """The citation: the ``REFERENCE`` constant of the module that defines the object."""
    return str(getattr(module(room, name), "REFERENCE", ""))
