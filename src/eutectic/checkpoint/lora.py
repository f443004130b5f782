"""A LoRA adapter over its base as a lazy view: W + s·B·A, computed for the elements that are read."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Thin, Turn
from eutectic.checkpoint.peft import ADVICE, Adapter, open_adapter
from eutectic.checkpoint.spec import Layout
from eutectic.errors import CheckpointError, did_you_mean

_BASE = "Is it the right base?"

#: The product is computed in blocks of about this many elements that begin at fixed rows.  Matrix products of different
#: heights may differ in their last bits; with fixed blocks an element is the same however it is read.
_BLOCK = 2**18


def open_lora(folder: str | Path, base: Checkpoint) -> Lora:
    """The PEFT LoRA adapter in ``folder``, applied to ``base``.

    Understood are LoRA, rsLoRA and DoRA of linear layers, embeddings and convolutions, and whole tensors
    (``modules_to_save``, biases).  Raises CheckpointError for anything else, and for what does not fit ``base``.
    """
    return Lora(base, open_adapter(folder))


@final
class Lora(Checkpoint):
    """``base`` with an adapter applied; it has the layout of ``base``, and owns both: closing it closes them.

    DoRA's weight is m · (W + s·B·A) / ‖W + s·B·A‖, row by row of the outputs (Liu et al., ICML 2024, arXiv:2402.09353,
    equation 5), with the norm in float32 where PEFT rounds it to the base's dtype.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        """Match every tensor of the adapter to one of ``base``.  Raises CheckpointError if one is left over or misfits."""
        self._base, self._adapter = base, adapter
        self.origin, self.files = f"{adapter.origin} over {base.origin}", (*adapter.files, *base.files)
        self.durable = adapter.file.durable and base.durable
        self._norms: dict[str, Tensor] = {}
        self._turn = Turn()
        require_fit(adapter, base)

    @property
    def specs(self) -> Layout:
        """Those of the base."""
        return self._base.specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        dtype = self._base.specs[name].dtype
        if name in self._adapter.replaced:
            return self._adapter.file._read(self._adapter.replaced[name], start, stop).to(dtype)
        if name not in self._adapter.targets or start == stop:
            return self._base._read(name, start, stop)
        rows, columns = self._size(name)
        height = max(1, _BLOCK // columns)
        first = start // columns // height * height
        blocks = [self._block(name, row, min(row + height, rows)) for row in range(first, -(-stop // columns), height)]
        return torch.cat(blocks).view(-1)[start - first * columns : stop - first * columns].to(dtype)

    def _size(self, name: str) -> tuple[int, int]:
        """Rows and columns of a weight as it lies in the base, a convolution's windows as rows."""
        shape = self._base.specs[name].shape
        return shape[0], self._base.specs[name].numel // shape[0]

    def _block(self, name: str, first: int, last: int) -> Tensor:
        """Some rows of the adapted weight, in float32 or wider."""
        changed, magnitude = self._changed(name, first, last), self._adapter.targets[name].magnitude
        if magnitude is None:
            return changed
        scale = self._adapter.file.read(magnitude).to(changed.dtype).view(-1) / self._norm(name)
        return changed * (scale if self._adapter.targets[name].turned else scale[first:last, None])

    def _changed(self, name: str, first: int, last: int) -> Tensor:
        _, columns = self._size(name)
        weight = self._base._read(name, first * columns, last * columns).view(last - first, columns)
        if self._adapter.targets[name].turned:
            delta = self._adapter.right(name)[:, first:last].T @ self._adapter.left(name).T
        else:
            delta = self._adapter.left(name, slice(first, last)) @ self._adapter.right(name)
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta

    def _norm(self, name: str) -> Tensor:
        """‖W + s·B·A‖ of each output, measured once."""
        with self._turn:
            if name not in self._norms:
                rows, columns = self._size(name)
                height = max(1, _BLOCK // columns)
                across = 0 if self._adapter.targets[name].turned else 1
                squares = [
                    self._changed(name, row, min(row + height, rows)).square().sum(across) for row in range(0, rows, height)
                ]
                self._norms[name] = (torch.cat(squares) if across else torch.stack(squares).sum(0)).sqrt()
            return self._norms[name]

    def thin(self, name: str) -> Thin | None:
        """W, s·B and A, in float32; of no columns where the adapter does nothing; None for what it replaces, and for DoRA."""
        spec = self.spec(name)
        if name in self._adapter.replaced or len(spec.shape) != 2:
            return None
        target = self._adapter.targets.get(name)
        if target is None:
            return Thin(self._base.read(name), torch.zeros(spec.shape[0], 0), torch.zeros(0, spec.shape[1]))
        if target.magnitude is not None:
            return None
        sB, A = self._adapter.left(name), self._adapter.right(name)
        return Thin(self._base.read(name), A.T, sB.T) if target.turned else Thin(self._base.read(name), sB, A)

    def need_bytes(self, name: str, n: int) -> int:
        """The base's elements, and for a weight that is adapted four numbers an element of its blocks, and the factors."""
        below = self._base.need_bytes(name, n)
        if name not in self._adapter.targets:
            return below
        wide = torch.promote_types(self._base.specs[name].dtype, torch.float32).itemsize
        factors = self._adapter.rank(name) * sum(self._adapter.shape(name))
        return below + 4 * wide * (n + 2 * _BLOCK + self._size(name)[1]) + 12 * factors

    def close(self) -> None:
        """Close the adapter and the base."""
        self._adapter.close()
        self._base.close()


def require_fit(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse, as a CheckpointError, an adapter with a tensor that ``base`` lacks or has in another shape."""
    for name, key in adapter.replaced.items():
        if name not in base.specs:
            raise CheckpointError(
                f"{adapter.origin}: {key!r} matches no tensor of {base.origin}.{did_you_mean(name, base.specs)} {_BASE}"
            )
        if adapter.file.specs[key].shape != base.specs[name].shape:
            raise CheckpointError(
                f"{adapter.origin}: {key!r} {adapter.file.specs[key]} does not fit "
                f"{name!r} {base.specs[name]} of {base.origin}. {_BASE}"
            )
    for name, target in adapter.targets.items():
        if name not in base.specs:
            raise CheckpointError(
                f"{adapter.origin}: adapts {name!r}, which {base.origin} lacks.{did_you_mean(name, base.specs)} {_BASE}"
            )
        weight, a, b = base.specs[name], adapter.file.specs[target.a], adapter.file.specs[target.b]
        if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            raise CheckpointError(
                f"{base.origin}: {name!r} {weight} is quantised, so an adapter cannot be added to it. Save the base in "
                "bfloat16 (transformers: model.dequantize()) and name that, or merge adapters to an adapter, without a base."
            )
        out, inputs = adapter.shape(name)
        shape = (inputs, out) if target.turned else (out, *a.shape[1:])
        if weight.shape != shape:
            raise CheckpointError(f"{adapter.origin}: {name!r} {weight} does not fit A {a} and B {b}. {_BASE}")
        if target.magnitude is not None and adapter.file.specs[target.magnitude].numel != out:
            raise CheckpointError(
                f"{adapter.origin}: {target.magnitude!r} {adapter.file.specs[target.magnitude]} does not fit {out} outputs. "
                f"{ADVICE}"
            )
