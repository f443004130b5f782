"""Checkpoints whose embeddings and heads follow an alignment: rows are looked up as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import final

import numpy as np
import torch
from torch import Tensor

from eutectic.checkpoint.alignment import BLEND, MEAN, ZERO, Alignment, RowMap
from eutectic.checkpoint.base import Checkpoint, Turn
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.errors import LayoutError

#: elements of an embedding that are read at once for its mean row
_BLOCK = 1 << 18

_INPUTS = "embed_tokens embed_tokens_per_layer wte word_embeddings tok_embeddings token_embedding token_embeddings embed_in"
_OUTPUTS = "lm_head lm_head.decoder lm_head.linear embed_out output_projection generator_lm_head vocab_projector"
_INPUT = f"(.*\\.)?({'|'.join(map(re.escape, _INPUTS.split()))})"
_OUTPUT = f"(.*\\.)?({'|'.join(map(re.escape, _OUTPUTS.split()))}|cls\\.predictions(\\.decoder)?)"
# some names mean a vocabulary only where they stand first
_WEIGHTS_IN = re.compile(rf"{_INPUT}\.weight|(model\.)?shared\.weight|backbone\.embeddings\.weight")
_WEIGHTS = re.compile(rf"{_WEIGHTS_IN.pattern}|{_OUTPUT}\.weight|(model\.)?output\.weight")
_BIASES = re.compile(rf"{_OUTPUT}\.bias|(.*\.)?final_logits_bias")


def aligned(models: Mapping[str, Checkpoint], alignment: Alignment) -> dict[str, Aligned]:
    """All models with the alignment's vocabulary.  Raises LayoutError."""
    return {name: Aligned(name, models, alignment) for name in alignment.models}


@final
class Aligned(Checkpoint):
    """A model whose embeddings and heads have the rows of an alignment; its other tensors are as they are.

    Rows that it lacks are read from the other models, which it does not own: closing it closes only its own.
    """

    def __init__(self, name: str, models: Mapping[str, Checkpoint], alignment: Alignment) -> None:
        """Match the tensors of all models to the plan, without reading one.

        Raises LayoutError if the model has no embedding, or one that is quantised or has too few rows, or if another
        model that a row comes from has none of the same width.
        """
        self._below = models[name]
        self.origin, self.files = self._below.origin, self._below.files
        self._map, self._reach = alignment.maps[name], alignment.reach[name]
        self._means: dict[str, Tensor] = {}
        self._lock = Turn()
        needed = _needed(self._map)
        own = alignment.models.index(name)
        needed[own] = max(needed.get(own, 0), self._reach)
        others = {i: models[alignment.models[i]] for i in needed}
        #: tensor → position of a model → that model's checkpoint and the name of its tensor
        self._tables = {
            tensor: {i: (other, _counterpart(self._below, tensor, other, needed[i])) for i, other in others.items()}
            for tensor in vocabulary_tensors(self._below.specs)
        }
        if not self._tables:
            raise LayoutError(
                f"{self.origin}: no tensor has the name of an embedding or head ({_INPUTS} {_OUTPUTS}). "
                "Rename yours, or leave out the tokenizer rule."
            )
        self._specs = {
            tensor: _resized(tensor, spec, alignment.rows) if tensor in self._tables else spec
            for tensor, spec in self._below.specs.items()
        }

    @property
    def specs(self) -> Layout:
        """Those below, with the new number of rows."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._tables or start == stop:
            return self._below._read(name, start, stop)
        spec = self._specs[name]
        width = _width(name, spec)
        out = torch.zeros(stop - start, dtype=spec.dtype)
        for kind, row, first, last in self._runs(start // width, -(-stop // width)):
            lo, hi = max(start, first * width), min(stop, last * width)
            if kind == ZERO:
                continue
            piece = self._piece(name, kind, row, first, lo - first * width, hi - first * width)
            if len(piece) == len(out):
                return piece.to(spec.dtype)
            out[lo - start : hi - start] = piece
        return out

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows ``first:last`` as runs that one read gives: what, from which row, and the new rows."""
        model, row = self._map.model[first:last], self._map.row[first:last]
        together = (model[1:] == model[:-1]) & ((model[1:] == ZERO) | ((model[1:] >= 0) & (row[1:] == row[:-1] + 1)))
        starts = [0, *(np.flatnonzero(~together) + 1).tolist()]
        for begin, end in zip(starts, [*starts[1:], last - first], strict=True):
            yield int(model[begin]), int(row[begin]), first + begin, first + end

    def _piece(self, name: str, kind: int, row: int, new: int, lo: int, hi: int) -> Tensor:
        """Elements ``lo:hi``, counted from the beginning of a run."""
        if kind == MEAN:
            return self._mean(name)[lo:hi]
        rows = self._map.blends[new] if kind == BLEND else ((kind, row),)
        pieces = [self._from(name, model, at, lo, hi) for model, at in rows]
        wide = torch.promote_types(self._specs[name].dtype, torch.float32)
        return pieces[0] if len(pieces) == 1 else torch.stack([piece.to(wide) for piece in pieces]).mean(0)

    def _from(self, name: str, model: int, row: int, lo: int, hi: int) -> Tensor:
        checkpoint, tensor = self._tables[name][model]
        at = row * _width(name, self._specs[name])
        return checkpoint._read(tensor, at + lo, at + hi)

    def _mean(self, name: str) -> Tensor:
        """The mean of the rows that belong to the model's tokens, read once, in blocks."""
        with self._lock:
            if name not in self._means:
                width = _width(name, self._specs[name])
                total = torch.zeros(width, dtype=torch.float64)
                step = max(1, _BLOCK // width)
                for row in range(0, self._reach, step):
                    flat = self._below._read(name, row * width, min(row + step, self._reach) * width)
                    total += flat.reshape(-1, width).double().sum(0)
                self._means[name] = (total / self._reach).to(torch.promote_types(self._specs[name].dtype, torch.float32))
            return self._means[name]

    def close(self) -> None:
        """Close the checkpoint below."""
        self._below.close()


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def vocabulary_tensors(layout: Layout) -> list[str]:
    """The embeddings, heads and heads' biases, whose rows are tokens, by their names and ranks."""
    found = []
    for name, spec in layout.items():
        rank = len(spec.shape)
        if (_WEIGHTS.fullmatch(name) and rank == 2) or (_BIASES.fullmatch(name) and rank and spec.numel == spec.shape[-1]):
            found.append(name)
    return found


def _needed(rows: RowMap) -> dict[int, int]:
    """Position of a model → how many rows its tensors must have."""
    needed: dict[int, int] = {}
    for model in np.unique(rows.model[rows.model >= 0]).tolist():
        needed[model] = 1 + int(rows.row[rows.model == model].max())
    for fill in rows.blends.values():
        for model, row in fill:
            needed[model] = max(needed.get(model, 0), row + 1)
    return needed


def _counterpart(model: Checkpoint, name: str, other: Checkpoint, needed: int) -> str:
    """The tensor of ``other`` that gives rows to ``name`` of ``model``: of the same name, or the embedding tied to a head."""
    found = name
    if name not in other.specs:
        inputs = [tensor for tensor in vocabulary_tensors(other.specs) if _WEIGHTS_IN.fullmatch(tensor)]
        if _BIASES.fullmatch(name) or len(inputs) != 1:
            raise LayoutError(
                f"{other.origin}: has no {name!r}, from which {model.origin} would take rows of tokens that it lacks"
            )
        found = inputs[0]
    wanted, spec = model.specs[name], other.specs[found]
    if not spec.dtype.is_floating_point:
        raise LayoutError(f"{other.origin}: {found!r} {spec} is quantised; give the model with floating-point weights")
    if len(spec.shape) != len(wanted.shape) or _width(found, spec) != _width(name, wanted):
        raise LayoutError(f"{other.origin}: {found!r} {spec} has other rows than {name!r} {wanted} of {model.origin}")
    if spec.numel < needed * _width(found, spec):
        raise LayoutError(
            f"{other.origin}: {found!r} {spec} has no row for id {needed - 1} of its vocabulary. Is its tokenizer another "
            "model's, or vocab_size in its config.json wrong?"
        )
    return found


def _width(name: str, spec: TensorSpec) -> int:
    """Elements of one token's row; in a bias it has one."""
    return 1 if _BIASES.fullmatch(name) else spec.shape[1]


def _resized(name: str, spec: TensorSpec, rows: int) -> TensorSpec:
    return spec._replace(shape=(*spec.shape[:-1], rows) if _BIASES.fullmatch(name) else (rows, spec.shape[1]))
