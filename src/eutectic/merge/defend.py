"""``defend``: the defence of a merge is a fusion of its own, which has the merge in its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eutectic import registry
from eutectic.errors import ParameterError, UnknownNameError, did_you_mean
from eutectic.methods._method import validated

#: what ``auto`` is called in the registry
AUTO = {"auto": "defence_ladder"}


def defended(method: str, parameters: Mapping[str, Any], defend: Any) -> tuple[str, dict[str, Any]]:
    """The fusion, and its parameters, that a merge under a defence is.

    ``defend`` is a defence's name, ``auto`` for the one that tries them in turn, or a mapping of ``method`` and ``parameters``.
    Raises UnknownNameError for a defence that there is not; ParameterError for what else is in ``defend``, for a method that
    is no closed form, and for parameters that the method or the defence refuses.
    """
    match defend:
        case str(name):
            own: Any = {}
        case {"method": str(name), **rest} if set(rest) <= {"parameters"}:
            own = rest.get("parameters") or {}
        case _:
            raise ParameterError("name a defence, or a mapping of `method` and `parameters`", ("defend",))
    if not isinstance(own, Mapping):
        raise ParameterError("`parameters` is a mapping", ("defend", "parameters"))
    name, known = AUTO.get(name, name), registry.defences()
    if name not in known:
        raise UnknownNameError(f"no defence is called {name!r}.{did_you_mean(name, [*known, *AUTO])}")
    if twice := sorted({"method", "parameters"} & set(own)):
        raise ParameterError(f"`{twice[0]}` of a defence is the recipe's own: leave it out", ("defend", "parameters", twice[0]))
    if registry.room_of(method) != "methods":
        raise ParameterError(f"{method} is fitted, or combines predictions: a defence is laid over a closed form", ("method",))
    validated(method, parameters)
    under = {**own, "method": method, "parameters": dict(parameters)}
    try:
        validated(name, under)
    except ParameterError as error:
        raise ParameterError(str(error), ("defend", "parameters", *error.where)) from None
    return name, under
