"""The routers of a mixture of experts that is made, not trained: a row for each expert, drawn or taken from prompts.

A router's logits are gate · x, ``gate`` [E, hidden].  Ways to make one (``MODES``):

    random            standard normal
    uniform_random    uniform within ± 1/√hidden
    hidden            ⎫ mean of the positive prompts' vectors − mean of the negative ones', over its L2 norm, for each layer.
    hidden_last       ⎬ A prompt's vector is what the router would see: at its last token (both the same),
    hidden_avg        ⎭ or the mean over its tokens
    cheap_embed       the same with the prompt's token embeddings, summed, over the L2 norm; equal in all layers

Differs from mergekit in: the vectors of ``hidden…`` are the MLP block's input, after its norm, because that is what the gate
will be multiplied with; mergekit takes hidden states from between the layers, and so does ``--compat mergekit``, those that
enter the layer.  Padding is in no mean (in mergekit's it is).  Numbers are drawn by (mode, tensor name), so neither order nor
threads matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Turn
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.errors import NonFiniteError, RecipeError
from eutectic.methods._native import random_uint32

PROMPTED = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
MODES = (*PROMPTED, "random", "uniform_random")
#: a gate whose condition number is above this tells its experts apart badly
MAX_CONDITION = 5.0


class Prompts(NamedTuple):
    """What an expert is for, and what it is not for."""

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


class Rows(NamedTuple):
    """A router's weight as rows ``first:last`` of a layer of all gates."""

    layer: int
    first: int
    last: int


@final
class Gates(Checkpoint):
    """Routers as float32 tensors, made all at once when the first is read."""

    def __init__(self, names: Mapping[str, Rows], width: int, make: Callable[[], Tensor]) -> None:
        """``make`` gives ``[layers, rows, width]``; it is called once, or again if it raised."""
        self._names, self._make, self._made = dict(names), make, list[Tensor]()
        self._lock = Turn()
        self._specs = {name: TensorSpec((at.last - at.first, width), torch.float32) for name, at in self._names.items()}
        self.origin = "gates"

    @property
    def specs(self) -> Layout:
        """Name → ``[rows, width]``."""
        return self._specs

    def __getstate__(self) -> dict[str, Any]:
        """A copy has them made, and cannot make them."""
        self.make()
        return self.__dict__ | {"_make": None}

    def make(self) -> None:
        """Make them now."""
        with self._lock:
            if not self._made:
                self._made.append(self._make().float().contiguous())

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        self.make()
        at = self._names[name]
        return self._made[0][at.layer, at.first : at.last].reshape(-1)[start:stop]


def gaussian(key: tuple[int | str, ...], start: int, n: int) -> Tensor:
    """Numbers ``start … start + n`` of the standard normal stream named by ``key``, float32 ``[n]``.

    Source: Box and Muller, "A note on the generation of random normal deviates", Ann. Math. Statist. 1958.
    """
    pairs = random_uint32(key, 2 * start, 2 * n).reshape(n, 2).astype(np.float64)
    radius = np.sqrt(-2 * np.log((pairs[:, 0] + 1) / 2.0**32))
    return torch.from_numpy((radius * np.cos(pairs[:, 1] * (2 * math.pi / 2.0**32))).astype(np.float32))


def drawn(mode: str, name: str, rows: int, width: int) -> Tensor:
    """A gate of random numbers, ``[rows, width]``; ``mode`` is ``random`` or ``uniform_random``."""
    if mode == "random":
        return gaussian((mode, name), 0, rows * width).view(rows, width)
    unit = random_uint32((mode, name), 0, rows * width) / 2.0**31 - 1
    return torch.from_numpy((unit / math.sqrt(width)).astype(np.float32)).view(rows, width)


def direction(prompts: Prompts, vectors: Mapping[str, Tensor]) -> Tensor:
    """The gate's row of one expert in each layer, ``[layers, width]``, of length 1; ``vectors`` are the prompts' likewise.

    Raises RecipeError if the positive and the negative prompts cancel out, NonFiniteError.
    """
    row = torch.stack([vectors[text].double() for text in prompts.positive]).mean(0)
    if prompts.negative:
        row = row - torch.stack([vectors[text].double() for text in prompts.negative]).mean(0)
    if not torch.isfinite(row).all():
        raise NonFiniteError("the base turns these prompts into a NaN or Inf; repair it, or choose `gate_mode: random`")
    norm = row.norm(dim=-1, keepdim=True)
    if not (norm > 0).all():
        raise RecipeError("the positive and the negative prompts cancel out: there is nothing that tells this expert's tokens")
    return row / norm


def condition(gate: Tensor) -> float:
    """The condition number of a gate ``[rows, width]``: its largest over its smallest singular value."""
    return float(torch.linalg.cond(gate.double()))
