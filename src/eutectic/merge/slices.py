"""Layers by pattern: finding a model's repeated blocks in the names of its tensors, and taking them from elsewhere.

No list of architectures: a stack is a prefix under which blocks are numbered 0, 1, 2 … (``model.layers.0.…``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Span, Spread
from eutectic.checkpoint.spec import Layout
from eutectic.errors import LayoutError

#: what comes before the first layer, and what looks so but is the head
_INPUT = re.compile(r"embed|\bw[tp]e\b|\bshared\b|(cls|mask|class)_token\b|\bpatch|\bpre_la?ye?r?norm|\bconv[12]\b|rotary")
_HEAD = re.compile(r"embed_out|unembed|lm_head")
#: how configs call the number of layers
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_encoder_layers", "encoder_layers", "depth")
_COUNTS += ("num_decoder_layers", "decoder_layers", "num_transformer_layers", "num_blocks")
#: words in the names of the modules of models that see and hear; the first that fits decides
_KINDS = {
    "projector": r"projector|merger|connector|aligner|resampler|q_?former|\bmlp1\b",
    "vision": r"vision|visual|image|\bvit\b",
    "audio": r"audio|speech|sound",
}
_TOWERS = ("vision", "visual", "audio", "speech")


class Stack(NamedTuple):
    """Numbered blocks: ``prefix.0`` and on, ``count`` of them."""

    prefix: str
    count: int


class Place(NamedTuple):
    """Where a tensor lies: in layer ``index`` of a stack as ``rest``."""

    stack: str
    index: int
    rest: str


class Origin(NamedTuple):
    """What a stack of the output is made of: how many layers its config's model had, and which of them are where."""

    count: int
    layers: tuple[int, ...]


def place_of(name: str) -> Place | None:
    """The outermost numbered block that a name is in; None for embeddings, norms and heads."""
    parts = name.split(".")
    for i, part in enumerate(parts[1:-1], start=1):
        if part.isascii() and part.isdigit():
            return Place(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))
    return None


def stacks_of(names: Iterable[str]) -> dict[str, Stack]:
    """All stacks of two blocks or more, the tallest first; numbers with gaps (``mlp.0``, ``mlp.2``) are no layers."""
    found: dict[str, set[int]] = {}
    for name in names:
        if place := place_of(name):
            found.setdefault(place.stack, set()).add(place.index)
    stacks = [Stack(prefix, len(seen)) for prefix, seen in found.items() if len(seen) > 1 and max(seen) == len(seen) - 1]
    return {stack.prefix: stack for stack in sorted(stacks, key=lambda stack: -stack.count)}


def main_stacks(names: Iterable[str]) -> dict[str, Stack]:
    """The tallest stack, and those as tall (encoder and decoder): what ``layer_range`` counts.

    Vision and audio towers count only where there is nothing else.
    """
    stacks = stacks_of(names)
    stacks = {prefix: stack for prefix, stack in stacks.items() if _kind(prefix) == "text"} or stacks
    tallest = max((stack.count for stack in stacks.values()), default=0)
    return {prefix: stack for prefix, stack in stacks.items() if stack.count == tallest}


def is_input(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: an embedding; else it is a norm or head after them."""
    return _INPUT.search(name) is not None and _HEAD.search(name) is None


def depths(names: Iterable[str], *, head: float = 1.0) -> dict[str, float]:
    """Name → how deep it lies: 0 for embeddings, i / (n − 1) in layer i of n (1 if there is one), ``head`` after them."""
    names = list(names)
    stacks = stacks_of(names)
    found = {}
    for name in names:
        place = place_of(name)
        if place and place.stack in stacks:
            found[name] = depth(place.index, stacks[place.stack].count)
        else:
            found[name] = 0.0 if is_input(name) else head
    return found


def depth(index: int, count: int) -> float:
    """Layer i of n lies at i / (n − 1), an only one at 1."""
    return index / (count - 1) if count > 1 else 1.0


def assigned(names: Iterable[str], modules: Sequence[str | None]) -> dict[str, str | None]:
    """Name → the module that it belongs to, for those that belong to one; the only module None has them all.

    A module has the tensors with its name among the parts of theirs (``encoder``); if there are none, its name says what
    it is: a projector, a vision or audio tower, or the language model, which has whatever is neither.
    """
    names = list(names)
    if list(modules) == [None]:
        return dict.fromkeys(names)
    given = [module for module in modules if module is not None]
    literal = [module for module in given if any(f".{module}." in f".{name}." for name in names)]
    kinds = {_kind(module): module for module in reversed(given) if module not in literal}
    found: dict[str, str | None] = {}
    for name in names:
        inside = [module for module in literal if f".{module}." in f".{name}."]
        owner = max(inside, key=len) if inside else kinds.get(_kind(name))
        if owner is not None:
            found[name] = owner
    return found


def _kind(name: str) -> str:
    """What a module or tensor is, by the words in its name; the language model if nothing else."""
    return next((kind for kind, words in _KINDS.items() if re.search(words, name)), "text")


@final
class Pick(Checkpoint):
    """Tensors of another checkpoint under names of one's own; one may serve under several names."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        """``names`` maps each new name to the one below; raises CheckpointError if that is not there."""
        self._below, self._names, self.origin = checkpoint, dict(names), checkpoint.origin
        self.files = checkpoint.files
        self._specs = {new: checkpoint.spec(old) for new, old in self._names.items()}

    @property
    def specs(self) -> Layout:
        """New name → shape and dtype."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._below._read(self._names[name], start, stop)

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """As below."""
        return self._below.read_spans([span._replace(name=self._names[span.name]) for span in spans])

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """As below."""
        self._below.prepare([self._names[name] for name in names], spread)

    def need_bytes(self, name: str, n: int) -> int:
        """As below."""
        return self._below.need_bytes(self._names[name], n)

    def grain(self, name: str) -> int:
        """As below."""
        return self._below.grain(self._names[name])

    def close(self) -> None:
        """Close the checkpoint below."""
        self._below.close()


def sliced_names(
    checkpoint: Checkpoint, names: Sequence[str], first: int, last: int, at: int, *, inputs: bool, head: bool
) -> dict[str, str]:
    """Output name → name in ``checkpoint``, for its layers ``first:last`` as the output's layers from ``at`` on.

    ``names`` are those of its tensors that belong to the module.  With ``inputs`` come the embeddings and all that stands
    beside the main stacks, with ``head`` the norms and heads after them.  Raises LayoutError if there are no such layers.
    """
    stacks, others = main_stacks(names), stacks_of(names)
    count = max((stack.count for stack in stacks.values()), default=0)
    if not 0 <= first < last <= count:
        has = f"its layers are 0 to {count - 1}, and the end is exclusive" if count else "no layers are found by their names"
        raise LayoutError(f"layer_range [{first}, {last}] is not in {checkpoint.origin}: {has}")
    found = {}
    for name in names:
        place = place_of(name)
        if place and place.stack in stacks:
            if first <= place.index < last:
                found[f"{place.stack}.{place.index - first + at}.{place.rest}"] = name
        elif inputs if is_input(name) or (place and place.stack in others) else head:
            found[name] = name
    return found


def relayered(config: Mapping[str, Any], origins: Mapping[str, Origin]) -> tuple[dict[str, Any], list[str]]:
    """A ``config.json`` with the numbers of layers, and lists with one entry a layer, that the new stacks have.

    Also the prefixes of those changed stacks whose number of layers the config does not tell.
    """
    found, lost = dict(config), []
    for prefix, origin in origins.items():
        if origin.layers != tuple(range(origin.count)):
            changed, hit = _relayered(found, prefix, origin)
            found = changed
            if not hit and len(origin.layers) != origin.count:
                lost.append(prefix)
    return found, lost


def _relayered(config: Mapping[str, Any], prefix: str, origin: Origin) -> tuple[dict[str, Any], bool]:
    found, hit = dict(config), False
    for key, value in config.items():
        if isinstance(value, dict):
            if any(word in key for word in _TOWERS) == any(word in prefix for word in _TOWERS):
                found[key], inner = _relayered(value, prefix, origin)
                hit = hit or inner
        elif isinstance(value, list) and "layer" in key and len(value) == origin.count:
            found[key] = [value[i] for i in origin.layers]
    for key in _count_keys(found, prefix, origin.count):
        found[key], hit = len(origin.layers), True
    return found, hit


def _count_keys(config: Mapping[str, Any], prefix: str, count: int) -> list[str]:
    keys = [key for key in _COUNTS if config.get(key) == count]
    if "decoder" in prefix:  # its own keys if it has some; the general ones are then the encoder's
        own = [key for key in keys if "decoder" in key]
        return own or [key for key in keys if "encoder" not in key]
    return [key for key in keys if "decoder" not in key]
