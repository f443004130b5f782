"""LoRA from a full fine-tune: the strongest directions of what it changed, as an adapter of its base."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.folder import model_card, provenance
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.peft import PREFIX, config_of
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.save import Progress, silent
from eutectic.checkpoint.spec import require_same_layout
from eutectic.errors import LayoutError, NonFiniteError, ParameterError
from eutectic.merge.adapter_folder import write_adapter
from eutectic.merge.view import rounding
from eutectic.methods._method import Site
from eutectic.methods._spectral import Svd, is_map, sketched

REFERENCE = "Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 2011, arXiv:0909.4061"
#: the rank from which a search for a share of the energy doubles
_FIRST = 16


class Extracted(NamedTuple):
    """B and A by PEFT's names, their ranks by weight, and what they leave out.

    ``errors`` are by rank, 0 and powers of two up to the largest: the share of the matrices' change, as ‖·‖, that an adapter of
    at most this rank leaves out.  ``rest`` is the share, as ‖·‖², of the whole change that is in tensors without a factor:
    embeddings, heads, norms, biases.
    """

    factors: Memory
    ranks: dict[str, int]
    errors: dict[int, float]
    rest: float


def extract(
    base: Checkpoint,
    expert: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    fan_in_fan_out: bool = False,
    progress: Progress = silent,
) -> Extracted:
    """The change of every matrix that a fine-tune changed, in ``rank`` directions or so many that hold ``energy`` of its ‖·‖².

    Args:
        base: what the expert was fine-tuned from.
        expert: with the base's layout, dtypes aside.
        rank: of every matrix, at most.
        energy: above 0, at most 1; either this or a rank.
        dtype: of the factors; that of each weight by default.
        fan_in_fan_out: the weights lie as ``[in, out]``, as GPT-2's do.
        progress: is told of each matrix.

    Raises ParameterError, LayoutError (also if no matrix was changed), NonFiniteError.
    """
    if (rank is None) == (energy is None):
        raise ParameterError("give either a rank or an energy")
    if rank is not None and rank < 1:
        raise ParameterError(f"rank = {rank}: an adapter has at least rank 1")
    if energy is not None and not 0 < energy <= 1:
        raise ParameterError(f"energy = {energy}: it is a share of ‖ΔW‖², above 0 and at most 1")
    require_same_layout(base.specs, expert.specs, base.origin, expert.origin, any_float=True)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    kept: list[Tensor] = []
    whole = rest = 0.0
    names = [name for name, spec in base.specs.items() if spec.dtype.is_floating_point]
    for done, name in enumerate(names, start=1):
        delta, noise = _change(base, expert, name)
        square = float(delta.double().square().sum())
        if not is_map(Site(name, base.specs[name].shape, 0, ())) or not name.endswith(".weight"):
            rest += square
        elif square:
            found = _directions(delta.T if fan_in_fan_out else delta, zlib.crc32(name.encode()), noise, square, rank, energy)
            root, kind = found.s.sqrt(), dtype or base.specs[name].dtype
            stem = PREFIX + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = (found.Vh * root[:, None]).to(kind)
            tensors[f"{stem}.lora_B.weight"] = (found.U * root).to(kind)
            ranks[name], whole = len(found.s), whole + square
            kept.append(found.s.double().square())
        progress("extracting", done, len(names))
    if not ranks:
        raise LayoutError(f"{expert.origin} changed no matrix of {base.origin}: there is nothing to extract")
    steps = [0, *(2**i for i in range(max(ranks.values()).bit_length())), max(ranks.values())]
    left = {step: max(0.0, whole - math.fsum(float(squares[:step].sum()) for squares in kept)) for step in sorted({*steps})}
    errors = {step: math.sqrt(lost / whole) for step, lost in left.items()}
    return Extracted(Memory(tensors, f"LoRA of {expert.origin}"), ranks, errors, rest / (rest + whole))


def save_extracted(
    found: Extracted,
    base: Checkpoint,
    expert: Checkpoint,
    out: Path | str,
    *,
    base_name: str | None = None,
    fan_in_fan_out: bool = False,
    replace: bool = False,
) -> Path:
    """Write an extracted adapter as a PEFT folder, whose config calls the base ``base_name``.  Raises OutputError."""
    out = Path(out)
    config = config_of(found.ranks, {"base_model_name_or_path": base_name, "fan_in_fan_out": fan_in_fan_out})
    lines = [f"rank {rank}: {100 * error:.3g} % left out" for rank, error in found.errors.items()]
    inputs = {
        name: {"origin": checkpoint.origin, "blake3": fingerprint(checkpoint)}
        for name, checkpoint in (("base", base), ("expert", expert))
    }
    with published(out, replace=replace, inputs=[file.parent for file in (*base.files, *expert.files)]) as folder:
        about: dict[str, Any] = write_adapter(found.factors, config, folder)
        about |= {"inputs": inputs, "ranks": found.ranks, "truncation_errors": found.errors, "rest": found.rest}
        (folder / "eutectic.json").write_text(provenance(about), encoding="utf-8")
        card = model_card(
            title=out.name,
            method="LoRA extraction",
            base_model=[base_name] if base_name else [],
            models=[Path(expert.origin).name],
            recipe="\n".join(lines),
            citations=[REFERENCE],
            library_name="peft",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def _change(base: Checkpoint, expert: Checkpoint, name: str) -> tuple[Tensor, float]:
    """What the expert changed, in float32 or float64, and up to which singular value that is rounding."""
    start, end = base.read(name), expert.read(name)
    wide = torch.promote_types(start.dtype, torch.float32)
    delta = end.to(wide) - start.to(wide)
    if not torch.isfinite(delta).all():
        raise NonFiniteError(f"{expert.origin} or {base.origin} holds a NaN or Inf in {name!r}")
    return delta, rounding(start.to(wide), max(torch.finfo(x.dtype).eps for x in (start, end)))


def _directions(delta: Tensor, seed: int, noise: float, square: float, rank: int | None, energy: float | None) -> Svd:
    """The strongest of a change with ‖·‖² = ``square``, of them one at least."""
    if energy is None:
        return _found(delta, min(rank or 1, *delta.shape), seed, noise)
    most = min(_FIRST, *delta.shape)
    while True:
        found = _found(delta, most, seed, noise)
        held = found.s.double().square().cumsum(0)
        enough = int((held < energy * square).sum()) + 1
        if enough <= len(held) or len(held) < most or most == min(delta.shape):
            count = min(enough, len(held))
            return Svd(found.U[:, :count], found.s[:count], found.Vh[:count])
        most = min(2 * most, *delta.shape)


def _found(delta: Tensor, most: int, seed: int, noise: float) -> Svd:
    found = sketched(delta, most, seed, noise)
    return found if len(found.s) else sketched(delta, 1, seed)
