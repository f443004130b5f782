"""The public verbs: open, merge, merge_adapters, save, state_dict, diff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, Memory, element_bytes, live
from eutectic.checkpoint.folder import from_hub, open_path
from eutectic.checkpoint.peft import open_adapter
from eutectic.checkpoint.spec import layout_diff
from eutectic.errors import CheckpointError
from eutectic.merge.adapters import Fused
from eutectic.merge.run import save
from eutectic.merge.spaces import SpaceName
from eutectic.merge.view import Merged

__all__ = ["diff", "merge", "merge_adapters", "open", "save", "state_dict"]

_T = TypeVar("_T")
Source = Checkpoint | str | Path | nn.Module | Mapping[str, Tensor]


def open(source: Source) -> Checkpoint:
    """Anything that holds weights as a lazy checkpoint.

    ``source`` is a folder, a ``.safetensors`` file, a PEFT folder, a hub id (``name/repo`` or ``name/repo@revision``, with
    the extra ``hub``), a module, a state dict, or a checkpoint already.  Raises CheckpointError.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return live(source)
    if isinstance(source, Mapping):
        return Memory(source)
    if isinstance(source, str) and not Path(source).exists() and _is_hub_id(source):
        repo, _, revision = source.partition("@")
        return open_path(from_hub(repo, revision or None))
    if isinstance(source, (str, Path)):
        return open_path(source)
    raise CheckpointError(f"a {type(source).__name__} is no checkpoint: give a path, a hub id, a module or a state dict")


def _is_hub_id(text: str) -> bool:
    """``name/repo``: two plain words, and nothing that looks like a path of this machine."""
    parts = text.partition("@")[0].split("/")
    return len(parts) == 2 and all(part and part[0] not in ".~" for part in parts) and not text.endswith(".safetensors")


def merge(
    method: str,
    /,
    base: Source | None,
    experts: Sequence[Source] | Mapping[str, Source],
    *,
    dtype: torch.dtype | None = None,
    **parameters: Any,
) -> Checkpoint:
    """Merge experts into one lazy checkpoint; nothing is computed until it is read or saved.

    Args:
        method: a registered name, see ``eutectic methods``.
        base: what the experts were fine-tuned from; None for methods that need none.
        experts: a list, or name → expert.
        dtype: of the output's floating tensors; with it, inputs of other floating dtypes are accepted.
        parameters: of the method.

    Raises LayoutError, ParameterError, UnknownNameError, CheckpointError.
    """
    opened = {name: open(expert) for name, expert in _named(experts).items()}
    return Merged(method, None if base is None else open(base), opened, parameters, dtype=dtype)


def merge_adapters(
    method: str,
    /,
    adapters: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    base: Source | None = None,
    space: SpaceName = "core",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    **parameters: Any,
) -> Fused:
    """Merge PEFT folders of one base into one adapter, a lazy checkpoint that ``save`` writes as a PEFT folder.

    Args:
        method: a registered name, of one that works on task vectors, or ``average``.
        adapters: folders, as a list or by name.
        base: needed only if an adapter replaces whole tensors (``modules_to_save``, biases).
        space: the coordinates that the method sees: ``core``, ``knots``, or for linear methods ``concat``.
        rank: of the result at most; ``error`` then says what that left out of what was read.
        dtype: of the result; the adapters' widest by default.
        parameters: of the method.

    The factors are read once at this call, and again as the result is read.
    Raises LayoutError, ParameterError, UnknownNameError, CheckpointError, NonFiniteError.
    """
    opened = {name: open_adapter(folder) for name, folder in _named(adapters).items()}
    over = None if base is None else open(base)
    return Fused(method, opened, parameters, base=over, space=space, rank=rank, dtype=dtype)


def _named(experts: Sequence[_T] | Mapping[str, _T]) -> Mapping[str, _T]:
    """Those of a list by their number."""
    return experts if isinstance(experts, Mapping) else {str(i): expert for i, expert in enumerate(experts)}


def state_dict(source: Source) -> dict[str, Tensor]:
    """All tensors of a checkpoint in memory, safe to write into."""
    checkpoint = open(source)
    return {name: checkpoint.read(name).clone() for name in checkpoint.specs}


def diff(left: Source, right: Source) -> list[str]:
    """One readable line for each tensor in which two checkpoints differ: layout first, else the size of the difference."""
    a, b = open(left), open(right)
    lines = layout_diff(a.specs, b.specs)
    for name in sorted(a.specs.keys() & b.specs.keys()):
        if a.specs[name] == b.specs[name]:
            x, y = a.read(name), b.read(name)
            if element_bytes(x.reshape(-1)) != element_bytes(y.reshape(-1)):
                lines.append(f"{name}: {a.specs[name]} {_difference(x, y)}")
    return lines


def _difference(x: Tensor, y: Tensor) -> str:
    if not x.dtype.is_floating_point:
        return f"{int((x != y).sum())} elements differ"
    delta, size = (x.double() - y.double()).norm(), x.double().norm()
    return f"‖Δ‖ = {delta:.4g}, ‖Δ‖ / ‖left‖ = {delta / size.clamp(min=1e-30):.3g}"
