"""Eutectic: fuse networks that were fine-tuned from one base, and know what the result is worth.

Importing this package imports neither torch nor anything else that is heavy; each name below is loaded when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eutectic.bench.evaluate import evaluate as evaluate
    from eutectic.bench.loading import load as load
    from eutectic.bench.loading import save as save
    from eutectic.bench.zoo import open_suite as open_suite
    from eutectic.checkpoint.base import Checkpoint as Checkpoint
    from eutectic.ensemble._api import combine as combine
    from eutectic.errors import EutecticError as EutecticError
    from eutectic.fusion._api import fuse as fuse
    from eutectic.merge.api import diff as diff
    from eutectic.merge.api import merge as merge
    from eutectic.merge.api import merge_adapters as merge_adapters
    from eutectic.merge.api import open as open
    from eutectic.merge.api import state_dict as state_dict
    from eutectic.merge.recipe import Recipe as Recipe
    from eutectic.record import Record as Record
    from eutectic.security.audit import audit as audit
    from eutectic.task import Task as Task
    from eutectic.tuning.experts import tune as tune

_HOMES = {
    "Checkpoint": "checkpoint.base",
    "EutecticError": "errors",
    "Recipe": "merge.recipe",
    "Record": "record",
    "Task": "task",
    "audit": "security.audit",
    "combine": "ensemble._api",
    "diff": "merge.api",
    "evaluate": "bench.evaluate",
    "fuse": "fusion._api",
    "load": "bench.loading",
    "merge": "merge.api",
    "merge_adapters": "merge.api",
    "open": "merge.api",
    "open_suite": "bench.zoo",
    "save": "bench.loading",
    "state_dict": "merge.api",
    "tune": "tuning.experts",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eutectic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"eutectic.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
