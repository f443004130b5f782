"""One document of a mergekit recipe over opened models: lays out modules and layers, and gives each tensor its numbers."""

from __future__ import annotations

import collections
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from eutectic.checkpoint.aligned import vocabulary_tensors
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.views import Cast
from eutectic.errors import CheckpointError, LayoutError, ParameterError, RecipeError
from eutectic.merge.compose import Joined, Outcome
from eutectic.merge.mergekit_methods import REQUIRED, THEIRS, Options
from eutectic.merge.mergekit_schema import Document, Module, Reference, Slice
from eutectic.merge.mergekit_values import Found, Path, Settings, lookup, unmatched
from eutectic.merge.slices import (
    Origin,
    Pick,
    assigned,
    depth,
    depths,
    main_stacks,
    place_of,
    sliced_names,
    stacks_of,
)
from eutectic.merge.view import Merged, Override
from eutectic.methods._method import build, validated


class _Item(NamedTuple):
    """One model of a slice: under which name, from which layer on, with which parameters of its own."""

    label: str
    model: Reference
    first: int
    settings: Settings
    path: Path
    checkpoint: Checkpoint


class _Numbers(NamedTuple):
    """mergekit's parameters for one tensor, and where the recipe says them: a list has one an expert."""

    values: dict[str, Any]
    paths: dict[str, list[Path | None]]


class Merger:
    """One document over its models, by the names that the recipe gives them."""

    def __init__(self, document: Document, models: Mapping[str, Checkpoint], notes: list[str]) -> None:
        """``notes`` are added to."""
        self.document, self.models, self.notes = document, models, notes
        self.reader, self.rule, self.compat = document.reader, document.rule, document.reader.compat
        self.dtype: torch.dtype | None = getattr(torch, document.dtype) if document.dtype else None
        self.head = 0.0 if self.compat else 1.0
        self.layers: dict[str, Origin] = {}
        #: the model whose config and tokenizer files the output takes over
        self.first = document.base or document.modules[0].slices[0].sources[0].model
        #: the models that must mean the same by a row: those with a part in embeddings and heads, and the first
        self.speakers: set[str] = set()

    def outcome(self, inner: Mapping[str, Outcome]) -> Outcome:
        """The document's output; ``inner`` are those of its models that are outputs themselves."""
        document = self.document
        first = self.first
        donor = self.models[first.text]
        parts: list[Checkpoint] = []
        for module in document.modules:
            made = self._module(module, donor)
            self._check_filters(module.settings, made)
            parts += made
        owned = assigned(donor.specs, self._modules())
        rest = [name for name in donor.specs if name not in owned]
        if rest:
            more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
            self.notes.append(
                f"{self.reader.where(['modules'])}: in no module, so they stay as in {first.text}: {rest[0]}{more}"
            )
            kept: Checkpoint = Pick(donor, {name: name for name in rest})
            self._heed(kept, [first.text])
            parts.append(Cast(kept, self.dtype) if self.dtype is not None else kept)
        self._check_filters(document.settings, parts)
        name = f"{document.method}({', '.join(dict.fromkeys(ref.text for ref in document.references()))})"
        return Outcome(parts[0] if len(parts) == 1 else Joined(parts, name), *_donor(first.text, self.layers, inner))

    def _heed(self, part: Checkpoint, models: Sequence[str]) -> None:
        """Keep the models that a part of the output is made of, if it has embeddings or heads."""
        if vocabulary_tensors(part.specs):
            self.speakers |= {*models, self.first.text}

    def _modules(self) -> list[str | None]:
        return [module.name for module in self.document.modules]

    def _names(self, checkpoint: Checkpoint, module: Module) -> list[str]:
        """The tensors of a model that belong to a module."""
        return [name for name, owner in assigned(checkpoint.specs, self._modules()).items() if owner == module.name]

    # ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _module(self, module: Module, donor: Checkpoint) -> list[Checkpoint]:
        """The merges of a module, one a slice."""
        if not self._names(donor, module):
            raise self.reader.error(module.path, f"no tensor of {donor.origin} belongs to the module {module.name!r}")
        parts: list[Checkpoint] = []
        at, origins = 0, dict[str, list[int]]()
        for number, piece in enumerate(module.slices):
            base, experts = self._roles(piece)
            reference = base or experts[0]
            names = self._names(reference.checkpoint, module)
            length = self._length(piece, names)
            count = length or max((stack.count for stack in main_stacks(names).values()), default=0)
            if length is None and len(module.slices) == 1:
                base, experts = base and self._whole(base, module), [self._whole(item, module) for item in experts]
                depth_of = depths((base or experts[0]).checkpoint.specs, head=self.head)
            else:
                cut = functools.partial(self._cut, module, count, at, inputs=number == 0, head=number == len(module.slices) - 1)
                base, experts = base and cut(base), [cut(item) for item in experts]
                depth_of = self._depths(list((base or experts[0]).checkpoint.specs), names, at, count)
                for prefix in main_stacks(names):
                    origins.setdefault(prefix, []).extend(range(reference.first, reference.first + count))
                at += count
            parts.append(self._merged(module, piece, base, experts, depth_of))
        for prefix, chosen in origins.items():
            stack = stacks_of(donor.specs).get(prefix)
            self.layers[prefix] = Origin(stack.count if stack else 0, tuple(chosen))
        return parts

    def _whole(self, item: _Item, module: Module) -> _Item:
        """An item with the tensors of a module only."""
        names = self._names(item.checkpoint, module)
        if len(names) == len(item.checkpoint.specs):
            return item
        return item._replace(checkpoint=Pick(item.checkpoint, {name: name for name in names}))

    def _cut(self, module: Module, count: int, at: int, item: _Item, *, inputs: bool, head: bool) -> _Item:
        """An item with those of its layers that a slice takes, where the output has them."""
        names, last = self._names(item.checkpoint, module), item.first + count
        with located(self.reader.where(item.path)):
            chosen = sliced_names(item.checkpoint, names, item.first, last, at, inputs=inputs, head=head)
        return item._replace(checkpoint=Pick(item.checkpoint, chosen))

    def _length(self, piece: Slice, names: Sequence[str]) -> int | None:
        """How many layers a slice has; None if it names no range."""
        layers = piece.sources[0].layers
        if layers is not None and not main_stacks(names):
            raise self.reader.error(piece.path, "`layer_range` needs numbered layers, and the tensors' names have none")
        return layers[1] - layers[0] if layers else None

    def _depths(self, laid: Sequence[str], names: Sequence[str], at: int, count: int) -> dict[str, float]:
        """How deep in its slice each tensor of the output lies."""
        found, main = depths(laid, head=self.head), main_stacks(names)
        for name in laid:
            place = place_of(name)
            if place and place.stack in main:
                found[name] = depth(place.index - at, count)
        return found

    def _roles(self, piece: Slice) -> tuple[_Item | None, list[_Item]]:
        """The base, if task vectors are taken from it, and the experts."""
        base = piece.base or self.document.base
        items: list[_Item] = []
        for source in piece.sources:
            text = source.model.text
            count = 1 + sum(item.model.text == text for item in items)  # a model may come twice
            label = text if count == 1 else f"{text} #{count}"
            first = source.layers[0] if source.layers else 0
            items.append(_Item(label, source.model, first, source.settings, source.path, self.models[text]))
        if base is None or self.rule.base == "member":
            return None, items
        listed = next((item for item in items if item.model.text == base.text), None)
        found = listed or _Item(base.text, base, items[0].first, {}, base.path, self.models[base.text])
        if self.rule.base == "joins":
            unlisted = listed is None and piece.sources[0].layers is None  # of `slices` mergekit takes the sources alone
            if unlisted and not self.compat:
                self.notes.append(
                    f"{self.reader.where(base.path)}: {self.document.method} takes no base_model, so {base.text} is left out; "
                    "list it if it is to be merged, as mergekit does"
                )
            return None, [found, *items] if unlisted and self.compat else items
        others = [item for item in items if item.model.text != base.text]
        if self.rule.base == "first":
            return None, [found, *others]
        if not others:
            raise self.reader.error(piece.path, f"{self.document.method}: no models besides the base_model {base.text}")
        return found, others

    # ── parameters ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _merged(
        self, module: Module, piece: Slice, base: _Item | None, experts: list[_Item], depth_of: Mapping[str, float]
    ) -> Checkpoint:
        reference = (base or experts[0]).checkpoint
        self._heed(reference, [item.model.text for item in (base, *experts) if item is not None])
        for settings in (piece.settings, *(item.settings for item in experts)):
            self._check_filters(settings, [reference])
        shared = [piece.settings, module.settings, self.document.settings]
        options: dict[str, Options] = {}
        numbers: dict[str, _Numbers] = {}
        keys: dict[str, str] = {}
        for name, spec in reference.specs.items():
            if spec.dtype.is_floating_point:
                found = self._numbers(name, depth_of[name], shared, experts, piece)
                if self.compat and spec.numel:
                    found = found._replace(values=self.rule.counts(found.values, spec.numel))
                keys[name] = key = json.dumps(found.values, sort_keys=True)
                if key not in options:
                    numbers[key] = found
                    with self._blaming(found):
                        options[key] = self.rule.translate(found.values, base is not None, self.compat)
        if not keys:  # nothing but integers
            return reference
        method, parameters = self._agreed(options, numbers, piece)
        common, _ = collections.Counter(keys.values()).most_common(1)[0]
        overrides = [Override(_literally(name), parameters[key]) for name, key in keys.items() if key != common]
        with located(self.reader.where(piece.path)):
            return Merged(
                method,
                base.checkpoint if base else None,
                {item.label: item.checkpoint for item in experts},
                parameters[common],
                overrides,
                self.dtype,
            )

    def _numbers(self, name: str, at: float, shared: list[Settings], experts: list[_Item], piece: Slice) -> _Numbers:
        """All parameters of the method for one tensor."""
        values: dict[str, Any] = {}
        paths: dict[str, list[Path | None]] = {}
        for key, default in self.rule.each.items():
            found = [
                self._found(lookup([item.settings, *shared], key, name, at), default, key, name, item.path, item.label)
                for item in experts
            ]
            values[key], paths[key] = [one.value for one in found], [one.path for one in found]
        for key, default in self.rule.shared.items():
            one = self._found(lookup(shared, key, name, at), default, key, name, piece.path, None)
            values[key], paths[key] = one.value, [one.path]
        return _Numbers(values, paths)

    def _found(self, found: Found | None, default: Any, key: str, name: str, path: Path, label: str | None) -> Found:
        if found is not None:
            return found
        if default is REQUIRED:
            of = f" of {label}" if label else ""
            raise self.reader.error(path, f"{self.document.method} needs `{key}`{of}, and there is none for {name!r}")
        return Found(default, None)

    def _agreed(self, options: Mapping[str, Options], numbers: Mapping[str, _Numbers], piece: Slice) -> tuple[str, dict]:
        """One method of ours for all tensors of a merge, and its parameters by their key."""
        first, *others = ([method for method, _ in found] for found in options.values())
        method = next((method for method in first if all(method in other for other in others)), None)
        if method is None:
            raise self.reader.error(piece.path, f"{self.document.method}: what is true or false must be so for all tensors")
        parameters = {}
        for key, found in options.items():
            chosen = dict(found)[method]
            with self._blaming(numbers[key]):
                parameters[key] = validated(method, chosen)
                build(method, chosen)
        return method, parameters

    @contextmanager
    def _blaming(self, numbers: _Numbers) -> Iterator[None]:
        """Errors about a parameter get the line where its value is said."""
        try:
            yield
        except ParameterError as error:
            named = re.search(r"parameter '(\w+)(?:\.(\d+))?'", str(error))
            if named:
                keys, index = [*THEIRS.get(named[1], ()), named[1]], int(named[2] or 0)
            else:
                keys, index = [key for key in numbers.paths if re.search(rf"\b{key}", str(error))], 0
            said = [numbers.paths[key] for key in keys if key in numbers.paths]
            path = next((found for paths in said for found in (paths[index : index + 1] + paths) if found), None)
            raise ParameterError(f"{self.reader.where(path or ['merge_method'])}: {error}") from None

    def _check_filters(self, settings: Settings, parts: Sequence[Checkpoint]) -> None:
        for choice in unmatched(settings, [name for part in parts for name in part.specs]):
            self.reader.refuse(choice.path, f"the filter {choice.filter!r} is in no tensor's name")


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors get the line of the recipe that they are about."""
    try:
        yield
    except (CheckpointError, LayoutError, ParameterError, RecipeError) as error:
        raise type(error)(f"{where}: {error}") from None


def _donor(first: str, layers: Mapping[str, Origin], inner: Mapping[str, Outcome]) -> tuple[str, dict[str, Origin]]:
    """The input whose config is taken over, and how the output's layers are made of its: through all inner documents."""
    if first not in inner:
        return first, dict(layers)
    below = inner[first]
    found = dict(below.layers)
    for prefix, origin in layers.items():
        under = below.layers.get(prefix, Origin(origin.count, tuple(range(origin.count))))
        found[prefix] = Origin(under.count, tuple(under.layers[i] for i in origin.layers))
    return below.donor, found


def _literally(name: str) -> str:
    """A glob pattern that matches one name."""
    return re.sub(r"([*?[])", r"[\1]", name)
