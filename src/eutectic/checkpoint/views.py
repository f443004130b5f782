"""Checkpoints made of checkpoints: rename, cast, select and overlay tensors without reading them.

A view owns what it looks at: closing the view closes that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Spread, Thin
from eutectic.checkpoint.spec import Layout, require_same_layout
from eutectic.errors import CheckpointError, LayoutError, did_you_mean


@final
class Rename(Checkpoint):
    """The same tensors under other names."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str] | Callable[[str], str]) -> None:
        """Rename by a mapping (names that it lacks stay) or by a function of the old name.

        Raises CheckpointError if two tensors would get one name, or if the mapping names a tensor that is not there.
        """
        self._below, self.origin = checkpoint, checkpoint.origin
        self.files = checkpoint.files
        if isinstance(names, Mapping):
            for old in names:
                checkpoint.spec(old)
            rename = {old: names.get(old, old) for old in checkpoint.specs}
        else:
            rename = {old: names(old) for old in checkpoint.specs}
        self._old: dict[str, str] = {}
        for old, new in rename.items():
            if new in self._old:
                raise CheckpointError(f"{self.origin}: both {self._old[new]!r} and {old!r} would be renamed to {new!r}")
            self._old[new] = old
        self._specs = {new: checkpoint.specs[old] for new, old in self._old.items()}

    @property
    def specs(self) -> Layout:
        """New name → shape and dtype."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._below._read(self._old[name], start, stop)

    def thin(self, name: str) -> Thin | None:
        """As below."""
        return self._below.thin(self._old[name])

    def close(self) -> None:
        """Close the checkpoint below."""
        self._below.close()


@final
class Cast(Checkpoint):
    """The same tensors with all floating-point ones in one dtype; integers and booleans stay."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Cast as tensors are read.  Raises CheckpointError if ``dtype`` is not floating-point."""
        if not dtype.is_floating_point:
            raise CheckpointError(f"{checkpoint.origin}: cannot cast weights to {dtype}; give a floating-point dtype")
        self._below, self.origin = checkpoint, checkpoint.origin
        self.files = checkpoint.files
        self._specs = {
            name: spec._replace(dtype=dtype) if spec.dtype.is_floating_point else spec
            for name, spec in checkpoint.specs.items()
        }

    @property
    def specs(self) -> Layout:
        """Name → shape and new dtype."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._below._read(name, start, stop).to(self._specs[name].dtype)

    def thin(self, name: str) -> Thin | None:
        """As below, with what it starts from cast."""
        found = self._below.thin(name)
        return None if found is None else found._replace(start=found.start.to(self._specs[name].dtype))

    def close(self) -> None:
        """Close the checkpoint below."""
        self._below.close()


@final
class Select(Checkpoint):
    """Some of the tensors."""

    def __init__(self, checkpoint: Checkpoint, which: str | Iterable[str] | Callable[[str], bool]) -> None:
        """Keep the tensors whose name matches a glob, any of several globs, or a predicate.

        Raises CheckpointError if a glob matches no tensor: it is misspelt.
        """
        self._below, self.origin = checkpoint, checkpoint.origin
        self.files = checkpoint.files
        if callable(which):
            kept = {name for name in checkpoint.specs if which(name)}
        else:
            kept = set()
            for pattern in [which] if isinstance(which, str) else which:
                found = {name for name in checkpoint.specs if fnmatchcase(name, pattern)}
                if not found:
                    raise CheckpointError(
                        f"{self.origin}: no tensor matches {pattern!r}.{did_you_mean(pattern, checkpoint.specs)}"
                    )
                kept |= found
        self._specs = {name: spec for name, spec in checkpoint.specs.items() if name in kept}

    @property
    def specs(self) -> Layout:
        """Name → shape and dtype of the kept tensors."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._below._read(name, start, stop)

    def thin(self, name: str) -> Thin | None:
        """As below."""
        return self._below.thin(name)

    def close(self) -> None:
        """Close the checkpoint below."""
        self._below.close()


@final
class Overlay(Checkpoint):
    """Two checkpoints as one, in which ``top``'s tensors replace those of ``bottom`` or join them."""

    def __init__(self, bottom: Checkpoint, top: Checkpoint) -> None:
        """Lay ``top`` over ``bottom``; a tensor of the same name may have another shape."""
        self.bottom, self._top = bottom, top
        self.origin, self.files = f"{top.origin} over {bottom.origin}", top.files + bottom.files
        self._specs = {**bottom.specs, **top.specs}

    @property
    def specs(self) -> Layout:
        """Name → shape and dtype, in the order of ``bottom``; what only ``top`` has comes last."""
        return self._specs

    def _of(self, name: str) -> Checkpoint:
        return self._top if name in self._top.specs else self.bottom

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._of(name)._read(name, start, stop)

    def thin(self, name: str) -> Thin | None:
        """That of the one whose tensor it is."""
        return self._of(name).thin(name)

    def grain(self, name: str) -> int:
        """That of the one whose tensor it is."""
        return self._of(name).grain(name)

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """Each for its own tensors."""
        for part in (self._top, self.bottom):
            part.prepare([name for name in names if self._of(name) is part], spread)

    def need_bytes(self, name: str, n: int) -> int:
        """That of the one whose tensor it is."""
        return self._of(name).need_bytes(name, n)

    def close(self) -> None:
        """Close both."""
        self._top.close()
        self.bottom.close()


@final
class Lerp(Checkpoint):
    """a + t (b − a) for floating-point tensors, computed in float32 (float64 for float64); all others are a's."""

    def __init__(self, a: Checkpoint, b: Checkpoint, t: float) -> None:
        """Interpolate, or for t outside 0 … 1 extrapolate, as tensors are read.  Raises LayoutError if they do not fit."""
        require_same_layout(a.specs, b.specs, a.origin, b.origin)
        self._a, self._b, self._t = a, b, t
        self.origin, self.files = f"{a.origin} → {b.origin} at {t}", a.files + b.files

    @property
    def specs(self) -> Layout:
        """Name → shape and dtype of ``a``."""
        return self._a.specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        a, b = self._a._read(name, start, stop), self._b._read(name, start, stop)
        if not a.dtype.is_floating_point:
            return a
        wide = torch.promote_types(a.dtype, torch.float32)
        return torch.lerp(a.to(wide), b.to(wide), self._t).to(a.dtype)

    def close(self) -> None:
        """Close both."""
        self._a.close()
        self._b.close()


@final
class Masked(Checkpoint):
    """θ₀ + m ⊙ (θ − θ₀), in θ₀'s dtypes and computed in float32 (float64 for float64): what a mask leaves of a change.

    Tensors that the mask lacks are θ's.
    """

    def __init__(self, base: Checkpoint, changed: Checkpoint, mask: Checkpoint) -> None:
        """Mask as tensors are read.  Raises LayoutError if θ does not fit θ₀, or a mask its tensor."""
        require_same_layout(base.specs, changed.specs, base.origin, changed.origin, any_float=True)
        for name, spec in mask.specs.items():
            if base.spec(name).shape != spec.shape:
                raise LayoutError(f"{mask.origin}: the mask of {name!r} is {spec}, the tensor {base.spec(name)}")
        self.base, self.changed, self.mask = base, changed, mask
        self.origin = f"{changed.origin} under {mask.origin}"
        self.files = tuple(dict.fromkeys(mask.files + changed.files + base.files))

    @property
    def specs(self) -> Layout:
        """As the base's."""
        return self.base.specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        changed, dtype = self.changed._read(name, start, stop), self.specs[name].dtype
        if name not in self.mask.specs:
            return changed.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        base = self.base._read(name, start, stop).to(wide)
        return torch.addcmul(base, self.mask._read(name, start, stop).to(wide), changed.to(wide).sub(base)).to(dtype)

    def grain(self, name: str) -> int:
        """As the change's."""
        return self.changed.grain(name)

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """As the change's."""
        self.changed.prepare(names, spread)

    def need_bytes(self, name: str, n: int) -> int:
        """What the change takes, and five numbers an element."""
        return self.changed.need_bytes(name, n) + 5 * n * max(4, self.specs[name].dtype.itemsize)

    def close(self) -> None:
        """Close all three."""
        for checkpoint in (self.base, self.changed, self.mask):
            checkpoint.close()


#: entries that are counted together
_BLOCK = 1 << 18


@final
class Repaired(Checkpoint):
    """The same tensors with a finite number wherever there is a NaN or Inf: the reference's, or 0 where that has none."""

    def __init__(self, checkpoint: Checkpoint, reference: Checkpoint) -> None:
        """``reference`` is not closed with it; a tensor that it lacks, or has in another size, is repaired by 0."""
        self._below, self._reference, self.origin = checkpoint, reference, checkpoint.origin
        self.files, self.durable = checkpoint.files, checkpoint.durable
        self._found: dict[tuple[str, int], int] = {}

    @property
    def specs(self) -> Layout:
        """As below."""
        return self._below.specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        flat = self._below._read(name, start, stop)
        wide = flat.float() if flat.itemsize == 1 else flat
        if not flat.dtype.is_floating_point or torch.isfinite(wide).all():
            return flat
        odd = ~torch.isfinite(wide)
        blocks, counts = torch.unique((odd.nonzero()[:, 0] + start) // _BLOCK, return_counts=True)
        for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            # a block is read in whole at least once, and perhaps in parts
            self._found[name, block] = max(count, self._found.get((name, block), 0))
        spec = self._reference.specs.get(name)
        same = spec is not None and spec.numel == self.specs[name].numel and self._below is not self._reference
        other = self._reference._read(name, start, stop) if same else torch.zeros(1)
        other = torch.nan_to_num(other.to(wide.dtype), nan=0.0, posinf=0.0, neginf=0.0)
        return torch.where(odd, other, wide).to(flat.dtype)

    def counts(self) -> dict[str, int]:
        """Tensor → how many entries were not finite among those that were read; tensors without any are left out."""
        found: dict[str, int] = {}
        for (name, _), count in self._found.items():
            found[name] = found.get(name, 0) + count
        return found

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """As below."""
        self._below.prepare(names, spread)

    def need_bytes(self, name: str, n: int) -> int:
        """Below's, the reference's elements, and a copy in float32."""
        return 2 * self._below.need_bytes(name, n) + 8 * n

    def close(self) -> None:
        """Close the checkpoint below."""
        self._below.close()
