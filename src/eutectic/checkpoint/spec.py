"""What a checkpoint holds, without its bytes: tensor specs, layouts, and how two layouts differ."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from eutectic.errors import LayoutError

#: safetensors' dtype names that we accept; all others (sub-byte formats among them) are refused by name.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the elements take."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        """E.g. ``[384, 1536] F32``."""
        return f"[{', '.join(map(str, self.shape))}] {DTYPE_NAMES.get(self.dtype, self.dtype)}"


Layout = Mapping[str, TensorSpec]


def layout_nbytes(layout: Layout) -> int:
    """Bytes of all tensors together."""
    return sum(spec.nbytes for spec in layout.values())


def layout_diff(left: Layout, right: Layout) -> list[str]:
    """One readable line for each tensor in which two layouts differ, in name order."""
    lines = []
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            lines.append(f"{name}: {left[name]} only on the left")
        elif name not in left:
            lines.append(f"{name}: {right[name]} only on the right")
        elif left[name] != right[name]:
            lines.append(f"{name}: {left[name]} against {right[name]}")
    return lines


def require_same_layout(
    base: Layout, expert: Layout, base_name: str, expert_name: str, *, any_float: bool = False, tokens: Collection[str] = ()
) -> None:
    """Refuse an expert whose names, shapes or dtypes are not the base's.

    ``any_float`` admits other *floating* dtypes, for callers that cast (a recipe with ``dtype``).
    ``tokens`` are tensors with a row for each token: if no other's shape differs, the vocabularies do.
    Raises LayoutError with the first differences and what to do.
    """
    lines, dtype_only, tokens_only = [], True, bool(tokens)
    for name in sorted(base.keys() | expert.keys()):
        left, right = base.get(name), expert.get(name)
        if left == right:
            continue
        if left is None or right is None:
            lines.append(f"  {name}: {'missing from ' + expert_name if right is None else 'only in ' + expert_name}")
            dtype_only = tokens_only = False
            continue
        if left.shape == right.shape:
            if any_float and left.dtype.is_floating_point and right.dtype.is_floating_point:
                continue
        else:
            dtype_only, tokens_only = False, tokens_only and name in tokens
        lines.append(f"  {name}: {expert_name} has {right}, {base_name} has {left}")
    if not lines:
        return
    more = f"\n  … and {len(lines) - 5} more" if len(lines) > 5 else ""
    advice = (
        "Give `dtype:` in the recipe (or dtype= in eu.merge) to cast them to one dtype."
        if dtype_only
        else "Their vocabularies differ: give a tokenizer rule in the recipe, such as `tokenizer: {source: union}`."
        if tokens_only
        else "They are not fine-tunes of one base; rename, select or resize tensors first (`eutectic diff` shows all of it)."
    )
    raise LayoutError(
        f"{expert_name} does not fit {base_name} in {len(lines)} tensor(s):\n" + "\n".join(lines[:5]) + more + "\n" + advice
    )
