"""Checkpoints made of several merges: tensors side by side, over models that are opened once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Span, Spread
from eutectic.checkpoint.spec import Layout
from eutectic.checkpoint.views import Masked, Overlay
from eutectic.errors import LayoutError
from eutectic.merge.slices import Origin
from eutectic.merge.upcycle import Mixture
from eutectic.merge.view import Merged
from eutectic.merge.vocabularies import Tokenizer


@final
class Joined(Checkpoint):
    """Checkpoints with different tensors as one; it owns nothing."""

    def __init__(self, parts: Sequence[Checkpoint], origin: str) -> None:
        """Put the parts side by side.  Raises LayoutError if two have a tensor of one name."""
        self.parts, self.origin = tuple(parts), origin
        self.files = tuple(dict.fromkeys(file for part in parts for file in part.files))
        self._part: dict[str, Checkpoint] = {}
        for part in parts:
            for name in part.specs:
                if self._part.setdefault(name, part) is not part:
                    raise LayoutError(f"{origin}: {name!r} comes from both {self._part[name].origin} and {part.origin}")
        self._specs = {name: part.specs[name] for name, part in self._part.items()}

    @property
    def specs(self) -> Layout:
        """The parts' tensors, one part after the other."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._part[name]._read(name, start, stop)

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """As the part's, if they are in one."""
        part = self._part[spans[0].name]
        if all(self._part[span.name] is part for span in spans):
            return part.read_spans(spans)
        return super().read_spans(spans)

    def grain(self, name: str) -> int:
        """As the part's."""
        return self._part[name].grain(name)

    def need_bytes(self, name: str, n: int) -> int:
        """As the part's."""
        return self._part[name].need_bytes(name, n)

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """As the parts."""
        for part in self.parts:
            part.prepare([name for name in names if self._part[name] is part], spread)


def merges_of(checkpoint: Checkpoint) -> list[Merged]:
    """The merges that a composition is made of, without those that these merge in turn."""
    parts = checkpoint.parts if isinstance(checkpoint, Joined) else [checkpoint]
    parts = [part.changed if isinstance(part, Masked) else part.bottom if isinstance(part, Overlay) else part for part in parts]
    return [part for part in parts if isinstance(part, Merged)]


class Outcome(NamedTuple):
    """What a recipe's build function gives: the tensors, and what else a saved folder needs to know.

    ``donor`` is the input whose config and tokenizer files the output takes over; ``layers`` says how the output's stacks
    are made of the donor's, for the config's number of layers, ``tokenizer`` what the output's is if not the donor's, and
    ``mixture`` what else becomes of the config if the output is a mixture of experts.
    """

    checkpoint: Checkpoint
    donor: str
    layers: Mapping[str, Origin]
    tokenizer: Tokenizer | None = None
    mixture: Mixture | None = None


@final
class Composed(Checkpoint):
    """The result of a recipe with any number of merges in it, as a lazy checkpoint.

    Built by ``build`` from opened inputs, and again over views of them by ``through``; it owns the inputs.
    """

    def __init__(
        self,
        inputs: Mapping[str, Checkpoint],
        build: Callable[[Mapping[str, Checkpoint]], Outcome],
        *,
        method: str,
        notes: Sequence[str] = (),
        chat_template: str | None = None,
        identity: str = "",
    ) -> None:
        """Build and check; no tensor is read.

        Args:
            inputs: every model that is read, by the name that the recipe gives it.
            build: makes the result from the inputs, or from views of them.
            method: for people.
            notes: what a person should know, a line each.
            chat_template: the text of the output's, if it is not to be that of its tokenizer's files.
            identity: what the result depends on beside inputs and recipe; an unfinished output of another is not carried on.
        """
        self.inputs, self._build = dict(inputs), build
        self.method, self.notes, self.chat_template, self.identity = method, tuple(notes), chat_template, identity
        self._below, self.donor, self.layers, self.tokenizer, self.mixture = build(self.inputs)
        self.origin, self.files = self._below.origin, self._below.files

    def __getstate__(self) -> dict[str, Any]:
        """A copy is for reading: what only viewing and saving need stays here."""
        return self.__dict__ | {"_build": None, "tokenizer": None, "mixture": None}

    @property
    def specs(self) -> Layout:
        """Of the result."""
        return self._below.specs

    @property
    def experts(self) -> list[str]:
        """The models that are merged, in order: all inputs but those that serve as a base alone."""
        if self.mixture is not None:
            return list(self.mixture.experts)
        named = dict.fromkeys(name for merged in merges_of(self._below) for name in merged.experts)
        return list(named) or list(self.inputs)

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the first merge; others, and single tensors, may have their own."""
        if self.mixture is not None:
            return dict(self.mixture.parameters)
        return dict(next((merged.parameters for merged in merges_of(self._below)), {}))

    @property
    def merges(self) -> list[Merged]:
        """The outermost merges, one for each part of the result."""
        return merges_of(self._below)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._below._read(name, start, stop)

    def through(self, view: Callable[[Checkpoint], Checkpoint]) -> Composed:
        """The same result from viewed inputs."""
        inputs = {name: view(checkpoint) for name, checkpoint in self.inputs.items()}
        return Composed(
            inputs,
            self._build,
            method=self.method,
            notes=self.notes,
            chat_template=self.chat_template,
            identity=self.identity,
        )

    def grain(self, name: str) -> int:
        """As the merge's that makes the tensor."""
        return self._below.grain(name)

    def passes(self) -> int:
        """How many times an input is read at most, not counting merges within merges."""
        return max((merged.passes() for merged in self.merges), default=self.mixture.passes if self.mixture else 1)

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """As the merge's that makes the tensors."""
        return self._below.read_spans(spans)

    def need_bytes(self, name: str, n: int) -> int:
        """As the merge's that makes the tensor."""
        return self._below.need_bytes(name, n)

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """Take the measurements that reading ``names`` needs."""
        self._below.prepare(names, spread)

    def close(self) -> None:
        """Close the inputs."""
        for checkpoint in self.inputs.values():
            checkpoint.close()
