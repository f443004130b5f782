"""What a closed-form method is: a pure function on stacked task vectors, after streamed measurements.

K = experts, always the first axis of a ``_K`` name.  A method sees either a flat chunk ``[K, n]`` (element scope), a
group of rows ``[K, rows, *rest]`` (row scope) or a whole tensor ``[K, *shape]`` (tensor scope), in float32 or float64.
"""

from __future__ import annotations

import enum
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field
from torch import Tensor

from eutectic import registry
from eutectic.errors import ParameterError, did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Over = Literal["tensor", "model"]

#: Element-scope chunks start at multiples of this many elements, so that sums over fixed blocks do not depend on chunking.
BLOCK = 4096


class Scope(enum.Enum):
    """How much of a tensor a method must see at once."""

    ELEMENT = "element"
    ROW = "row"
    TENSOR = "tensor"


class Site(NamedTuple):
    """Where a chunk lies: the tensor's name and full shape, the flat index of its first element, the experts' names.

    ``noise`` bounds the largest singular value of what rounding alone puts into a task vector: θₖ and θ₀ are stored in
    float32, so their difference carries θ₀'s rounding.  It is known in tensor scope only.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    experts: tuple[str, ...]
    noise: float = 0.0


Stats = Mapping[str, Any]
Apply = Callable[[Tensor, Site, Stats], Tensor]


class Measure(NamedTuple):
    """A streamed measurement: a monoid, so it runs over chunks in any order, on threads, shards or machines.

    ``init(K)`` is the neutral state; ``observe(state, x_K, site, stats)`` adds one chunk, with the finished stats of
    earlier measures at hand; ``merge`` joins two states; ``finish`` makes the stat that ``apply`` finds under ``key``.
    """

    key: str
    init: Callable[[int], Any]
    observe: Callable[[Any, Tensor, Site, Stats], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]
    over: Over = "tensor"


class Method(NamedTuple):
    """A merge method with its parameters bound.

    ``measures`` cost one pass over the inputs each, in order.  ``space`` says whether x_K are task vectors (and the
    result is added to the base) or plain weights (and no base is read).  ``experts`` is the allowed count, (least, most).
    ``sited`` methods look at the site; what others make of a tensor does not depend on its name or on what lies before a chunk.
    ``scope_of`` narrows the scope for some tensors, by name and shape.  ``workspace`` is the memory that ``apply`` takes beside
    x_K, in bytes for each entry of it.
    """

    apply: Apply
    scope: Scope = Scope.ELEMENT
    measures: tuple[Measure, ...] = ()
    space: Literal["delta", "weight"] = "delta"
    experts: tuple[int, int | None] = (1, None)
    sited: bool = False
    scope_of: Callable[[str, tuple[int, ...]], Scope] | None = None
    workspace: int = 16

    def scope_at(self, name: str, shape: tuple[int, ...]) -> Scope:
        """How much of this tensor it must see at once."""
        return self.scope if self.scope_of is None else self.scope_of(name, shape)


def chain(*links: Method, **fields: Any) -> Method:
    """Run methods one after the other; each measures what the links before it hand on.

    The widest scope wins, and the counts of experts that all links allow.  ``fields`` override ``space`` or ``experts`` of
    the result.  Raises ParameterError if the links allow no common count.
    """
    scopes = list(Scope)
    measures: list[Measure] = []
    before: Apply = _identity
    for position, link in enumerate(links):
        prefix = f"{position}."
        measures += [_measured_after(before, prefix, measure) for measure in link.measures]
        before = _then(before, prefix, link.apply)

    def scope_of(name: str, shape: tuple[int, ...]) -> Scope:
        return max((link.scope_at(name, shape) for link in links), key=scopes.index)

    merged = Method(
        before,
        max((link.scope for link in links), key=scopes.index),
        tuple(measures),
        sited=any(link.sited for link in links),
        scope_of=scope_of,
        workspace=max(link.workspace for link in links),
    )
    least = max(link.experts[0] for link in links)
    most = min((link.experts[1] for link in links if link.experts[1] is not None), default=None)
    if most is not None and most < least:
        raise ParameterError(f"parameters with one number an expert must agree in their length, got {most} and {least}")
    return merged._replace(experts=(least, most))._replace(**fields)


def _identity(x_K: Tensor, site: Site, stats: Stats) -> Tensor:
    return x_K


def _under(stats: Stats, prefix: str) -> Stats:
    return {key.removeprefix(prefix): value for key, value in stats.items() if key.startswith(prefix)}


def _then(before: Apply, prefix: str, apply: Apply) -> Apply:
    return lambda x_K, site, stats: apply(before(x_K, site, stats), site, _under(stats, prefix))


def _measured_after(before: Apply, prefix: str, measure: Measure) -> Measure:
    def observe(state: Any, x_K: Tensor, site: Site, stats: Stats) -> Any:
        return measure.observe(state, before(x_K, site, stats), site, _under(stats, prefix))

    return measure._replace(key=prefix + measure.key, observe=observe)


def build(name: str, parameters: Mapping[str, Any]) -> Method:
    """The registered method with its parameters checked against its signature.

    Raises UnknownNameError for the method, ParameterError naming the parameter, its range and the nearest name.
    """
    return registry.get("methods", name)(**validated(name, parameters))


def validated(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The method's parameters, checked and coerced, defaults filled in.  Raises ParameterError."""
    schema = signature_model(name)
    unknown = [key for key in parameters if key not in schema.model_fields]
    if unknown:
        advice = did_you_mean(unknown[0], schema.model_fields) if schema.model_fields else " It takes none."
        raise ParameterError(f"method {name!r} has no parameter {unknown[0]!r}.{advice}", (unknown[0],))
    try:
        model = schema(**parameters)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # pydantic also names the branch of a union: only the parameter and the index within a list are of use
        path = tuple(part for i, part in enumerate(first["loc"]) if i == 0 or isinstance(part, int))
        where = ".".join(map(str, path))
        raise ParameterError(f"method {name!r}, parameter {where!r} = {first['input']!r}: {first['msg']}", path) from None
    return {key: getattr(model, key) for key in schema.model_fields}


def build_inner(wrapper: str, name: str, parameters: Mapping[str, Any] | None) -> Method:
    """The method that another one wraps, which it takes as its own parameters ``method`` and ``parameters``.

    Raises UnknownNameError for the method, ParameterError for its parameters or if it does not work on task vectors.
    """
    try:
        found = build(name, parameters or {})
    except ParameterError as error:
        raise ParameterError(f"method {wrapper!r}, parameter 'parameters' = {parameters!r}: {error}") from None
    if found.space != "delta":
        raise ParameterError(
            f"method {wrapper!r}, parameter 'method' = {name!r}: it has to work on task vectors, not on weights"
        )
    return found


@functools.cache
def signature_model(name: str) -> type[pydantic.BaseModel]:
    """The method's signature as a pydantic model: its schema for recipes, the command line and the documentation."""
    factory = registry.get(registry.room_of(name), name)
    hints = typing.get_type_hints(factory, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for key, parameter in inspect.signature(factory).parameters.items()
    }
    return pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
