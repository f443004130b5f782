"""In which pieces a part of a tensor is read and worked on, so that a method sees whole rows or tensors where it needs them."""

from __future__ import annotations

from typing import NamedTuple

from eutectic.checkpoint.base import Span
from eutectic.checkpoint.spec import TensorSpec
from eutectic.methods._method import Scope


class Piece(NamedTuple):
    """Elements ``start:stop`` of a tensor, and the shape in which a method wants them."""

    start: int
    stop: int
    shape: tuple[int, ...]


class Cut(NamedTuple):
    """What has to be read for some elements of a tensor, ``start:stop``, and the pieces in which it is worked on."""

    start: int
    stop: int
    pieces: list[Piece]


def cut(span: Span, spec: TensorSpec, scope: Scope, chunk: int, *, once: bool = False) -> Cut:
    """The pieces of a span, of about ``chunk`` elements; they reach beyond it where the scope needs whole rows or tensors.

    With ``once`` spans that meet have no piece in common.
    """
    _, start, stop = span
    if scope is Scope.TENSOR:
        return Cut(start, start, []) if once and start else Cut(0, spec.numel, [Piece(0, spec.numel, spec.shape)])
    by_row = scope is Scope.ROW
    width = row(spec) if by_row else 1
    step = max(1, chunk // width) * width
    first = -(-start // width) * width if once else start // width * width
    last = min(-(-stop // width) * width, spec.numel)
    pieces = []
    for low in range(first, last, step):
        high = min(low + step, last)
        pieces.append(Piece(low, high, ((high - low) // width, width) if by_row else (high - low,)))
    return Cut(min(start, first), max(stop, last), pieces)


def row(spec: TensorSpec) -> int:
    """Elements of a row: all of a vector, else all but the first axis."""
    return max(1, spec.numel if len(spec.shape) < 2 else spec.numel // max(1, spec.shape[0]))
