"""Everything Eutectic refuses, as one tree.

    EutecticError                   one line: what, where, what to do; the command line exits with 2
    ├── CheckpointError             a file or folder that cannot be trusted or read
    ├── LayoutError                 models whose tensors do not fit together
    ├── NonFiniteError              a NaN or Inf where there must be none
    │   └── StoppedError             a loss that is not finite; has the last good artefact
    ├── RecipeError                 a recipe that says something impossible; knows its file and line
    ├── ParameterError              a method's parameter that is misspelt, missing or out of range
    ├── UnknownNameError            a method, suite or task that nobody registered
    ├── TaskError                   a task, split or head that cannot be scored
    ├── BudgetError                 a merge that does not fit the memory it may take
    ├── OutputError                 an output that exists, or cannot be written
    │   └── DiskFullError           there is, or would be, no room for the output
    ├── ClusterError                machines that do not answer, differ, or are lost again and again
    └── MissingDependencyError      an optional package that this call needs

Anything else that escapes is a bug in Eutectic.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class EutecticError(Exception):
    """Base of every error that Eutectic raises on purpose."""


class CheckpointError(EutecticError):
    """A file or folder that cannot be trusted or read."""


class LayoutError(EutecticError):
    """Models whose tensors do not fit together."""


class NonFiniteError(EutecticError):
    """A NaN or Inf where there must be none."""


class StoppedError(NonFiniteError):
    """A fit that met a loss that is not finite; ``artefact`` is the best that it had by then, to be applied like any other."""

    artefact: Any = None


class RecipeError(EutecticError):
    """A recipe that says something impossible."""


class ParameterError(EutecticError):
    """A method's parameter that is misspelt, missing or out of range; ``where`` is its path, if it is known."""

    def __init__(self, message: str, where: tuple[str | int, ...] = ()) -> None:
        """Keep the message and the path."""
        super().__init__(message)
        self.where = where


class UnknownNameError(EutecticError):
    """A name that nobody registered."""


class TaskError(EutecticError):
    """A task, split or head that cannot be scored."""


class BudgetError(EutecticError):
    """A merge that does not fit the memory it may take."""


class OutputError(EutecticError):
    """An output that exists already, or cannot be written."""


class DiskFullError(OutputError):
    """There is, or would be, no room for the output."""


class ClusterError(EutecticError):
    """Machines that do not answer, differ, or are lost again and again."""


class MissingDependencyError(EutecticError):
    """An optional package that this call needs."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'ties'?"``, or the whole list when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known) or 'none'}."
