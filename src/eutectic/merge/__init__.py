"""A closed-form method over checkpoints of any size: recipes, plans, the lazy merge and its saving.

This room bears the name of the verb ``eutectic.merge``, and importing any part of it binds the room to that name in the
package.  So the room can be called, and does what the verb does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from eutectic.merge.api import merge

        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
