"""The checkpoint that is a merge: reading it merges, a chunk at a time."""

from __future__ import annotations

import fnmatch
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eutectic.checkpoint.aligned import vocabulary_tensors
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.spec import Layout, TensorSpec, require_same_layout
from eutectic.errors import LayoutError, NonFiniteError, ParameterError, RecipeError
from eutectic.methods._method import BLOCK, Measure, Method, Scope, Site, build, validated

#: Elements of one expert that are worked on at once (4 MiB in float32).  Larger chunks leave the processor's caches.
CHUNK = 1 << 20


class Override(NamedTuple):
    """Parameters that differ for the tensors whose names match a glob pattern."""

    match: str
    parameters: Mapping[str, Any]


class Merged(Checkpoint):
    """θ = merge(base, experts) as a lazy checkpoint; also of other merges.

    The layout is the base's (without a base, the first expert's).  Arithmetic is float32 (float64 for float64 tensors);
    integers and booleans pass through from the base.  Everything that can be refused without reading a tensor is
    refused here.
    """

    def __init__(
        self,
        method: str,
        base: Checkpoint | None,
        experts: Mapping[str, Checkpoint],
        parameters: Mapping[str, Any] | None = None,
        overrides: Sequence[Override] = (),
        dtype: torch.dtype | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """Bind and check.

        Args:
            method: a registered name.
            base: θ₀; methods in weight space do without.
            experts: name → checkpoint, at least one; the names seed the methods that draw random numbers.
            parameters: of the method.
            overrides: later ones win over earlier ones and over ``parameters``.
            dtype: of the output's floating tensors; with it, inputs of other floating dtypes are accepted.
            chunk: elements worked on at once; a multiple of 4,096.

        Raises:
            LayoutError: no expert, the wrong number of them, no base where one is needed, or tensors that do not fit.
            UnknownNameError, ParameterError: the method or its parameters.
            RecipeError: an override matches no tensor.
        """
        if chunk < BLOCK or chunk % BLOCK:
            raise ValueError(f"chunk must be a positive multiple of {BLOCK}, not {chunk}")
        if dtype is not None and not dtype.is_floating_point:
            raise ParameterError(f"dtype = {dtype}: weights are floating-point numbers; give one of their dtypes")
        self.method, self.base, self.experts = method, base, dict(experts)
        self.dtype = dtype
        self.files = tuple(file for c in (base, *self.experts.values()) if c is not None for file in c.files)
        self.parameters = validated(method, parameters or {})
        self.overrides = tuple(overrides)
        said = json.dumps([self.parameters, [list(o) for o in self.overrides]], sort_keys=True)
        self.origin = f"{method}({', '.join(c.origin for c in self.inputs.values())}) {said}"
        self.chunk = chunk
        self._methods: dict[str, Method] = {}
        self._stats: dict[tuple[str, int, str], Any] = {}
        self._locks: dict[tuple[str, int, str], threading.Lock] = {}
        main = build(method, parameters or {})
        self._require_count(main)
        reference = base or next(iter(self.experts.values()))
        reference_name = "the base" if base is not None else f"expert {next(iter(self.experts))!r}"
        words = vocabulary_tensors(reference.specs)
        for name, expert in self.experts.items():
            require_same_layout(
                reference.specs,
                expert.specs,
                reference_name,
                f"expert {name!r} ({expert.origin})",
                any_float=dtype is not None,
                tokens=words,
            )
        self._reference = reference
        self._specs = {
            name: spec._replace(dtype=dtype) if dtype is not None and spec.dtype.is_floating_point else spec
            for name, spec in reference.specs.items()
        }
        self._keys = self._parameters_by_tensor()
        for key in set(self._keys.values()):
            self._methods[key] = build(method, json.loads(key))

    def _require_count(self, method: Method) -> None:
        least, most = method.experts
        count = len(self.experts)
        if count == 0:
            raise LayoutError(f"{self.method}: no experts were given; name at least {least}")
        if count < least or (most is not None and count > most):
            wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            raise LayoutError(
                f"{self.method} with these parameters takes {wanted} expert(s), got {count}: {', '.join(self.experts)}"
            )
        if method.space == "delta" and self.base is None:
            raise LayoutError(f"{self.method} works on task vectors: name the `base` that the experts were fine-tuned from")

    def _parameters_by_tensor(self) -> dict[str, str]:
        """Floating-point tensor → its parameters as canonical JSON: tensors with equal keys share a method and its stats."""
        applied: dict[str, list[Override]] = {name: [] for name in self._specs}
        for override in self.overrides:
            match = override.match
            # a name as it is needs no search: there may be an override for each tensor
            found = [match] if match in applied else [name for name in applied if fnmatch.fnmatchcase(name, match)]
            if not found:
                raise RecipeError(f"the override {match!r} matches no tensor of {self._reference.origin}")
            for name in found:
                applied[name].append(override)
        keys: dict[tuple[int, ...], str] = {}
        for overrides in applied.values():
            if (same := tuple(map(id, overrides))) not in keys:
                merged = dict(self.parameters)
                for override in overrides:
                    merged |= override.parameters
                keys[same] = json.dumps(validated(self.method, merged), sort_keys=True)
        return {
            name: keys[tuple(map(id, overrides))]
            for name, overrides in applied.items()
            if self._specs[name].dtype.is_floating_point
        }

    @property
    def specs(self) -> Layout:
        """The base's names and shapes, with the output's dtypes."""
        return self._specs

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """``base``, if there is one, and the experts by name."""
        return ({"base": self.base} if self.base is not None else {}) | {f"experts.{n}": c for n, c in self.experts.items()}

    def through(self, view: Callable[[Checkpoint], Checkpoint]) -> Merged:
        """The same merge of viewed inputs."""
        experts = {name: view(expert) for name, expert in self.experts.items()}
        base = view(self.base) if self.base is not None else None
        return Merged(self.method, base, experts, self.parameters, self.overrides, self.dtype, self.chunk)

    def close(self) -> None:
        """Close the base and the experts."""
        for checkpoint in self.inputs.values():
            checkpoint.close()

    def passes(self) -> int:
        """How many times the inputs are read: once to apply, and once for each measurement."""
        return 1 + max((len(method.measures) for method in self._methods.values()), default=0)

    def prepare(self, name: str) -> None:
        """Take the measurements that reading ``name`` needs; reading does so by itself, this does it beforehand."""
        if name in self._keys:
            self._measured(name, len(self._methods[self._keys[name]].measures))

    def grain(self, name: str) -> int:
        """A method that needs the whole tensor computes all of it for any part."""
        whole = name in self._keys and self._methods[self._keys[name]].scope is Scope.TENSOR
        return max(1, self._specs[name].numel) if whole else 1

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._keys:
            return self._reference.read_flat(name, start, stop)
        method = self._methods[self._keys[name]]
        spec = self._specs[name]
        stats = self._measured(name, len(method.measures))
        out = torch.empty(stop - start, dtype=spec.dtype)
        for first, last, shape in self._pieces(name, method, start, stop):
            x_K, base = self._stack(name, method, first, last)
            noise = _rounding(base, spec, self._eps(name)) if base is not None and method.scope is Scope.TENSOR else 0.0
            site = Site(name, spec.shape, first, tuple(self.experts), noise)
            merged = method.apply(x_K.view(len(x_K), *shape), site, stats).reshape(-1)
            if base is not None:
                merged = merged + base
            result = merged.to(spec.dtype)
            _require_finite(result, f"the merge of {name!r} overflows {spec.dtype}; choose a wider dtype or a smaller scale")
            cut = slice(max(start, first), min(stop, last))
            out[cut.start - start : cut.stop - start] = result[cut.start - first : cut.stop - first]
        return out

    def _pieces(self, name: str, method: Method, start: int, stop: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Ranges that cover ``start:stop`` and suit the method's scope, each with the shape in which it wants them."""
        spec = self._specs[name]
        match method.scope:
            case Scope.ELEMENT:
                for first in range(start, stop, self.chunk):
                    last = min(first + self.chunk, stop)
                    yield first, last, (last - first,)
            case Scope.ROW:
                row = _row(spec)
                step = max(1, self.chunk // row) * row
                for first in range(start // row * row, stop, step):
                    last = min(first + step, spec.numel)
                    yield first, last, ((last - first) // row, row)
            case Scope.TENSOR:
                yield 0, spec.numel, spec.shape

    def _eps(self, name: str) -> float:
        """The coarsest relative step in which an input stores a tensor."""
        return max(torch.finfo(checkpoint.spec(name).dtype).eps for checkpoint in self.inputs.values())

    def _stack(self, name: str, method: Method, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """The experts' chunk ``[K, n]`` in the method's space, and the base's chunk if that is task vectors."""
        wide = torch.float64 if self._specs[name].dtype == torch.float64 else torch.float32
        x_K = torch.empty(len(self.experts), last - first, dtype=wide)
        for x, (expert, checkpoint) in zip(x_K, self.experts.items(), strict=True):
            x.copy_(checkpoint.read_flat(name, first, last))
            _require_finite(x, f"expert {expert!r} ({checkpoint.origin}) holds a NaN or Inf in {name!r}; repair or drop it")
        if method.space == "weight" or self.base is None:
            return x_K, None
        base = self.base.read_flat(name, first, last).to(wide)
        _require_finite(base, f"the base ({self.base.origin}) holds a NaN or Inf in {name!r}; repair it")
        return x_K.sub_(base), base

    def _measured(self, name: str, count: int) -> dict[str, Any]:
        """The finished stats of the first ``count`` measures for one tensor."""
        measures = self._methods[self._keys[name]].measures[:count]
        return {measure.key: self._stat(name, position, measure) for position, measure in enumerate(measures)}

    def _stat(self, name: str, position: int, measure: Measure) -> Any:
        key = self._keys[name]
        where = (key, position, name if measure.over == "tensor" else "")
        with self._locks.setdefault(where, threading.Lock()):
            if where not in self._stats:
                names = [name] if measure.over == "tensor" else [n for n, k in self._keys.items() if k == key]
                self._stats[where] = self._observe(names, position, measure)
        return self._stats[where]

    def _observe(self, names: list[str], position: int, measure: Measure) -> Any:
        state = measure.init(len(self.experts))
        for name in names:
            method, spec = self._methods[self._keys[name]], self._specs[name]
            earlier = self._measured(name, position)
            for first, last, shape in self._pieces(name, method, 0, spec.numel):
                x_K, _ = self._stack(name, method, first, last)
                site = Site(name, spec.shape, first, tuple(self.experts))
                state = measure.observe(state, x_K.view(len(x_K), *shape), site, earlier)
        return measure.finish(state)


def _row(spec: TensorSpec) -> int:
    """Elements of a row: all of a vector, else all but the first axis."""
    return max(1, spec.numel if len(spec.shape) < 2 else spec.numel // max(1, spec.shape[0]))


def _rounding(base: Tensor, spec: TensorSpec, eps: float) -> float:
    """The largest singular value to expect of the rounding of a matrix: that of noise of its size, with a margin of two."""
    if len(spec.shape) != 2:
        return 0.0
    step = eps * float(base.norm()) / math.sqrt(max(1, spec.numel))  # of a typical element
    return 2 * step / math.sqrt(12) * (math.sqrt(spec.shape[0]) + math.sqrt(spec.shape[1]))


def _require_finite(x: Tensor, message: str) -> None:
    # one cheap sum finds any NaN or Inf; only if it is odd do we look closely (a sum of finite numbers may overflow)
    if not torch.isfinite(x.sum(dtype=torch.float32)) and not torch.isfinite(x.float() if x.itemsize == 1 else x).all():
        raise NonFiniteError(message)
