"""The checkpoint that is a merge: reading it merges, a chunk at a time."""

from __future__ import annotations

import collections
import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eutectic.checkpoint.aligned import vocabulary_tensors
from eutectic.checkpoint.base import Checkpoint, Span, Spread, Turn
from eutectic.checkpoint.hashed import LEAF
from eutectic.checkpoint.spec import Layout, require_same_layout
from eutectic.errors import LayoutError, NonFiniteError, ParameterError, RecipeError
from eutectic.merge import pieces
from eutectic.merge.pieces import Cut, Piece
from eutectic.methods._method import BLOCK, Measure, Method, Scope, Site, build, validated
from eutectic.methods._native import narrow, widen

#: Elements of all experts together that are worked on at once (4 MiB in float32).  More would leave the processor's caches.
CHUNK = 1 << 20
#: Elements of a tensor that are read at once (whole leaves, so that they are hashed as they pass), and measured as one job.
READ, JOB = 4 * LEAF, 1 << 22

Where = tuple[str, int, str]  # what a measurement is of: parameters, position among the measures, tensor ("": all of them)
Job = tuple[Where, list[Span], bool]  # and whether it is all there is to measure


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
        chunk: int | None = None,
    ) -> None:
        """Bind and check.

        Args:
            method: a registered name.
            base: θ₀; methods in weight space do without.
            experts: name → checkpoint, at least one; the names seed the methods that draw random numbers.
            parameters: of the method.
            overrides: later ones win over earlier ones and over ``parameters``.
            dtype: of the output's floating tensors; with it, inputs of other floating dtypes are accepted.
            chunk: elements worked on at once, a multiple of 4,096; by default so many that the experts' fit the caches.

        Raises:
            LayoutError: no expert, the wrong number of them, no base where one is needed, or tensors that do not fit.
            UnknownNameError, ParameterError: the method or its parameters.
            RecipeError: an override matches no tensor.
        """
        if chunk is None:
            chunk = max(BLOCK, CHUNK // max(4, len(experts)) // BLOCK * BLOCK)
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
        self._stats: dict[Where, Any] = {}
        self._turn = Turn()
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
        self._build_methods()

    def _build_methods(self) -> None:
        self._methods = {key: build(self.method, json.loads(key)) for key in set(self._keys.values())}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has what was measured, and builds the methods by itself: functions in functions cannot be pickled."""
        return self.__dict__ | {"_methods": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the methods."""
        self.__dict__ |= state
        self._build_methods()

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

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """Take the measurements that reading ``names`` needs; reading does so by itself, but on one thread."""
        for checkpoint in self.inputs.values():
            checkpoint.prepare([name for name in names if name in checkpoint.specs], spread)
        whole = {key for key, method in self._methods.items() if any(m.over == "model" for m in method.measures)}
        asked_for = set(names)
        names = (
            [name for name, key in self._keys.items() if name in asked_for or key in whole]
            if whole
            else [name for name in names if name in self._keys]
        )
        for position in range(self.passes() - 1):
            asked = {where: self._measure(name, position) for name in names if (where := self._where(name, position))}
            with self._turn:
                asked = {where: measure for where, measure in asked.items() if where not in self._stats}
                if asked:
                    self._stats |= self._taken(names, asked, position, spread)

    def grain(self, name: str) -> int:
        """A method that needs the whole tensor computes all of it for any part, and so may an input that is a merge."""
        own = max(1, self._specs[name].numel) if self._scope(name) is Scope.TENSOR else 1
        return max(own, *(checkpoint.grain(name) for checkpoint in self.inputs.values()))

    def need_bytes(self, name: str, n: int) -> int:
        """The inputs' elements, and for one chunk the stack of experts, base and result in float32 and the method's own."""
        spec = self._specs[name]
        if name not in self._keys:
            return super().need_bytes(name, n)
        scope = self._scope(name)
        n = max(n, spec.numel) if scope is Scope.TENSOR else n
        chunk = n if scope is Scope.TENSOR else min(n, max(self.chunk, pieces.row(spec) if scope is Scope.ROW else 0))
        wide = 8 if spec.dtype == torch.float64 else 4
        method, k = self._methods[self._keys[name]], len(self.experts)
        work = chunk * (k * (wide + method.workspace) + 3 * wide)
        return work + spec.dtype.itemsize * n + sum(checkpoint.need_bytes(name, n) for checkpoint in self.inputs.values())

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self.read_spans([Span(name, start, stop)])

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """Merge parts of tensors; those that the method treats alike are one computation."""
        first = spans[0].name
        if first not in self._keys:
            return self._reference.read_spans(spans)
        spec = self._specs[first]
        out = torch.empty(sum(stop - start for _, start, stop in spans), dtype=spec.dtype)
        if len(spans) > 1 and self._alike(spans):
            ends = [(low, min(low + self.chunk, len(out))) for low in range(0, len(out), self.chunk)]
            self._merge_into(out, spans, Cut(0, len(out), [Piece(low, high, (high - low,)) for low, high in ends]), 0)
            return out
        at = 0
        for span in spans:
            size = span.stop - span.start
            self._merge_into(out[at : at + size], [span], self._cut(span), span.start)
            at += size
        return out

    def _merge_into(self, out: Tensor, spans: Sequence[Span], cut: Cut, start: int) -> None:
        """Merge the pieces of a cut into ``out``, which begins at ``start``."""
        name = spans[0].name
        method, spec = self._methods[self._keys[name]], self._specs[name]
        stats = self._measured(name, len(method.measures))
        stop = start + len(out)
        for piece, x_K, base in self._stacks(spans, cut, method):
            site = self._site(name, piece, base)
            merged = method.apply(x_K, site, stats).reshape(-1)
            low, high = max(start, piece.start), min(stop, piece.stop)
            part = slice(low - piece.start, high - piece.start)
            if not narrow(merged[part], None if base is None else base[part], out[low - start : high - start]):
                raise NonFiniteError(f"the merge of {name!r} overflows {spec.dtype}; choose a wider dtype or a smaller scale")

    def _alike(self, spans: Sequence[Span]) -> bool:
        """Whether a method makes the same of tensors end to end as of each by itself."""
        key = self._keys[spans[0].name]
        method = self._methods[key]
        return (
            not method.sited
            and all(measure.over == "model" for measure in method.measures)
            and all(self._keys[span.name] == key and self._scope(span.name) is Scope.ELEMENT for span in spans)
        )

    def _scope(self, name: str) -> Scope:
        if name not in self._keys:
            return Scope.ELEMENT
        return self._methods[self._keys[name]].scope_at(name, self._specs[name].shape)

    def _site(self, name: str, piece: Piece, base: Tensor | None) -> Site:
        spec = self._specs[name]
        whole = base is not None and self._scope(name) is Scope.TENSOR
        noise = rounding(base.view(spec.shape), self._eps(name)) if whole and base is not None else 0.0
        return Site(name, spec.shape, piece.start, tuple(self.experts), noise)

    def _cut(self, span: Span, *, once: bool = False) -> Cut:
        return pieces.cut(span, self._specs[span.name], self._scope(span.name), self.chunk, once=once)

    def _eps(self, name: str) -> float:
        """The coarsest relative step in which an input stores a tensor."""
        return max(torch.finfo(checkpoint.spec(name).dtype).eps for checkpoint in self.inputs.values())

    def _stacks(self, spans: Sequence[Span], cut: Cut, method: Method) -> Iterator[tuple[Piece, Tensor, Tensor | None]]:
        """The experts' pieces ``[K, *shape]`` in the method's space, and the base's if that is task vectors."""
        if not cut.pieces:
            return
        name = spans[0].name
        if len(spans) == 1:
            spans = [Span(name, cut.start, cut.stop)]
        of_base = self.base.read_spans(spans) if method.space == "delta" and self.base is not None else None
        of_experts = [checkpoint.read_spans(spans) for checkpoint in self.experts.values()]
        wide = torch.float64 if self._specs[name].dtype == torch.float64 else torch.float32
        where = repr(name) if len(spans) == 1 else f"{name!r} to {spans[-1].name!r}"
        for piece in cut.pieces:
            part, n = slice(piece.start - cut.start, piece.stop - cut.start), piece.stop - piece.start
            base = torch.empty(n, dtype=wide) if of_base is not None else None
            if of_base is not None and base is not None and not widen(of_base[part], None, base):
                raise NonFiniteError(f"the base ({self.base and self.base.origin}) holds a NaN or Inf in {where}; repair it")
            x_K = torch.empty(len(of_experts), n, dtype=wide)
            for x, raw, (expert, checkpoint) in zip(x_K, of_experts, self.experts.items(), strict=True):
                if not widen(raw[part], base, x):
                    raise NonFiniteError(
                        f"expert {expert!r} ({checkpoint.origin}) holds a NaN or Inf in {where}; repair or drop it"
                    )
            yield piece, x_K.view(len(x_K), *piece.shape), base

    # ── measurements ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _measure(self, name: str, position: int) -> Measure:
        return self._methods[self._keys[name]].measures[position]

    def _where(self, name: str, position: int) -> Where | None:
        """What a measurement is of: one tensor, or all that share parameters; None if the method has fewer measures."""
        key = self._keys[name]
        measures = self._methods[key].measures
        return (key, position, name if measures[position].over == "tensor" else "") if position < len(measures) else None

    def _measured(self, name: str, count: int) -> dict[str, Any]:
        """The finished stats of the first ``count`` measures for one tensor."""
        found = {}
        for position, measure in enumerate(self._methods[self._keys[name]].measures[:count]):
            where = (self._keys[name], position, name if measure.over == "tensor" else "")
            if where not in self._stats:
                self.prepare([name])
            found[measure.key] = self._stats[where]
        return found

    def _taken(self, names: Sequence[str], asked: Mapping[Where, Measure], position: int, spread: Spread) -> dict[Where, Any]:
        """Take measurements at one position, job by job, and finish them."""
        jobs = self._jobs(names, asked, position)
        left = collections.Counter(where for where, *_ in jobs)
        states = {where: measure.init(len(self.experts)) for where, measure in asked.items() if left[where] != 1}
        found = {}
        for (where, _, alone), state in zip(jobs, spread(self._observe, jobs), strict=True):
            if alone:
                found[where] = state
                continue
            states[where] = asked[where].merge(states[where], state)
            left[where] -= 1
            if not left[where]:  # at once: a state may be megabytes, and there may be thousands of tensors
                found[where] = asked[where].finish(states.pop(where))
        return found | {where: asked[where].finish(state) for where, state in states.items()}

    def _jobs(self, names: Sequence[str], asked: Mapping[Where, Measure], position: int) -> list[Job]:
        """Parts of large tensors, and small ones together, in the tensors' order."""
        runs: list[tuple[Where, list[Span]]] = []
        held = 0
        for name in names:
            where = self._where(name, position)
            if where is None or where not in asked:
                continue
            for start in range(0, self._specs[name].numel, JOB):
                stop = min(start + JOB, self._specs[name].numel)
                if not runs or where != runs[-1][0] or held + stop - start > JOB:
                    runs.append((where, []))
                    held = 0
                runs[-1][1].append(Span(name, start, stop))
                held += stop - start
        count = collections.Counter(where for where, _ in runs)
        return [(where, spans, count[where] == 1) for where, spans in runs]

    def _observe(self, job: Job) -> Any:
        """The state after a job's spans; finished, if it is alone."""
        (key, position, _), spans, alone = job
        measure = self._methods[key].measures[position]
        state = measure.init(len(self.experts))
        for name, first, last in spans:
            earlier = self._measured(name, position)
            for start in range(first, last, READ):
                span = Span(name, start, min(start + READ, last))
                for piece, x_K, _ in self._stacks([span], self._cut(span, once=True), self._methods[key]):
                    state = measure.observe(state, x_K, self._site(name, piece, None), earlier)
        return measure.finish(state) if alone else state


def rounding(base: Tensor, eps: float) -> float:
    """The largest singular value to expect of the rounding of a matrix: that of noise of its size, with a margin of two.

    ``eps`` is the relative step between numbers of the dtype that it is stored in.
    """
    if base.ndim != 2:
        return 0.0
    step = eps * float(base.norm()) / math.sqrt(max(1, base.numel()))  # of a typical element
    return 2 * step / math.sqrt(12) * (math.sqrt(base.shape[0]) + math.sqrt(base.shape[1]))
