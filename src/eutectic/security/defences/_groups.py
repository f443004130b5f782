"""Experts of the same task, of which one is made before they are merged with those of other tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import ParameterError, did_you_mean
from eutectic.merge.view import Merged
from eutectic.security.defences._defended import merged

#: task → the names of its experts
Groups = Mapping[str, Sequence[str]]


def grouped(experts: Mapping[str, Checkpoint], groups: Groups | None) -> dict[str, dict[str, Checkpoint]]:
    """Each group's experts, in order; without groups all are one.  An expert in no group is a group of its own.

    Raises ParameterError for an expert that there is not, or that is in two groups, and for an empty group.
    """
    if groups is None:
        return {"experts": dict(experts)}
    found: dict[str, dict[str, Checkpoint]] = {}
    taken: dict[str, str] = {}
    for group, names in groups.items():
        if not names:
            raise ParameterError(f"groups: {group!r} is empty", ("groups", group))
        for name in names:
            if name not in experts:
                raise ParameterError(f"groups: there is no expert {name!r}.{did_you_mean(name, experts)}", ("groups", group))
            if name in taken:
                raise ParameterError(f"groups: {name!r} is in {taken[name]!r} and in {group!r}", ("groups", group))
            taken[name] = group
        found[group] = {name: experts[name] for name in names}
    alone = {name: {name: weights} for name, weights in experts.items() if name not in taken}
    if twice := set(found) & set(alone):
        name = min(twice)
        raise ParameterError(f"groups: {name!r} is also an expert that is in no group", ("groups", name))
    return found | alone


def mean(some: Mapping[str, Checkpoint]) -> Checkpoint:
    """A group's average; the expert itself if it is alone."""
    return Merged("average", None, some) if len(some) > 1 else next(iter(some.values()))


def together(base: Checkpoint, made: Mapping[str, Checkpoint], about: Mapping[str, Any]) -> Checkpoint:
    """The merge of what was made of each group; of one there is nothing to merge."""
    return merged(base, made, about) if len(made) > 1 else next(iter(made.values()))
