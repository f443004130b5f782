"""A LoRA adapter over its base as a lazy view: W + s·B·A, computed for the elements that are read.

Whatever an adapter's config asks for and we do not understand is refused by name: a merge that silently leaves out a
part of the adapter is worse than none.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from eutectic.checkpoint._files import inside, read_json
from eutectic.checkpoint.base import Checkpoint, Thin
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.checkpoint.spec import Layout
from eutectic.errors import CheckpointError, did_you_mean

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ADVICE = "Merge the adapter with PEFT (merge_and_unload), save that, and open it instead."
_BASE = "Is it the right base?"

#: what our arithmetic honours, or checks by itself
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "bias",
    "init_lora_weights",
}
#: what says where the adapter came from or how it was trained; its effect is all in the weights
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config"),
}
#: initialisations that leave the base alone; others (PiSSA, OLoRA, LoftQ, CorDA …) shift it, and W + s·B·A is then wrong
_INITS = {True, False, None, "gaussian", "eva", "orthogonal"}

#: The product is computed in blocks of about this many elements that begin at fixed rows.  Matrix products of different
#: heights may differ in their last bits; with fixed blocks an element is the same however it is read.
_BLOCK = 2**18


class Update(NamedTuple):
    """One adapted weight: the names of A and B in the adapter, and s."""

    a: str
    b: str
    scale: float


def open_lora(folder: str | Path, base: Checkpoint) -> Lora:
    """The PEFT LoRA adapter in ``folder``, applied to ``base``.

    Raises CheckpointError for anything but LoRA of two-dimensional weights, and whole tensors (``modules_to_save``), that
    fit ``base``.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder}: adapter_model.bin is a pickle, which can run code. Save the adapter as {WEIGHTS_FILE}."
        )
    config = _config(inside(folder, CONFIG_FILE))
    adapter = SafetensorsFile(inside(folder, WEIGHTS_FILE))
    found = Lora(base, adapter, config)
    found.files = (*adapter.files, folder / CONFIG_FILE, *base.files)
    return found


@final
class Lora(Checkpoint):
    """``base`` with an adapter applied; it has the layout of ``base``, and owns both: closing it closes them."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint, config: dict[str, Any]) -> None:
        """Match every tensor of the adapter to one of ``base``.  Raises CheckpointError if one is left over or misfits."""
        self._base, self._adapter = base, adapter
        self.origin, self.files = f"{adapter.origin} over {base.origin}", (*adapter.files, *base.files)
        self.durable = adapter.durable and base.durable
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._updates, self._replaced = _match(base, adapter, config)

    @property
    def specs(self) -> Layout:
        """Those of the base."""
        return self._base.specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        dtype = self._base.specs[name].dtype
        if name in self._replaced:
            return self._adapter._read(self._replaced[name], start, stop).to(dtype)
        weight = self._base._read(name, start, stop)
        if name not in self._updates or start == stop:
            return weight
        wide = weight.to(torch.promote_types(dtype, torch.float32))
        return (wide + self._delta(name, start, stop)).to(dtype)

    def _delta(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` of s·B·A, from the blocks of rows that cover them."""
        rows, columns = self._base.specs[name].shape
        height = max(1, _BLOCK // columns)
        first = start // columns // height * height
        blocks = [self._block(name, row, min(row + height, rows)) for row in range(first, -(-stop // columns), height)]
        return torch.cat(blocks).view(-1)[start - first * columns : stop - first * columns]

    def _block(self, name: str, first: int, last: int) -> Tensor:
        a, b, scale = self._updates[name]
        if self._transposed:  # the weight is [in, out], so its update is (B·A)ᵀ = Aᵀ·Bᵀ
            return (self._adapter.read(a).float()[:, first:last].T @ self._adapter.read(b).float().T) * scale
        return (self._adapter.read(b, slice(first, last)).float() @ self._adapter.read(a).float()) * scale

    def thin(self, name: str) -> Thin | None:
        """W, s·B and A, in float32; of no columns where the adapter does nothing; None for what it replaces."""
        spec = self.spec(name)
        if name in self._replaced or len(spec.shape) != 2:
            return None
        start = self._base.read(name)
        if name not in self._updates:
            return Thin(start, torch.zeros(spec.shape[0], 0), torch.zeros(0, spec.shape[1]))
        a, b, scale = self._updates[name]
        A, sB = self._adapter.read(a).float(), self._adapter.read(b).float() * scale
        return Thin(start, A.T, sB.T) if self._transposed else Thin(start, sB, A)

    def close(self) -> None:
        """Close the adapter and the base."""
        self._adapter.close()
        self._base.close()


# ── the config ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is understood. {_ADVICE}")
    for key, value in config.items():
        if value and key not in _READ | _NEUTRAL:
            raise CheckpointError(f"{path}: {key!r} is {str(value)[:60]}, which is not understood. {_ADVICE}")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only 'none' is understood. {_ADVICE}")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise CheckpointError(f"{path}: init_lora_weights is {init!r}, which shifts the base's own weights. {_ADVICE}")
    _require_number(path, "r", config.get("r"))
    _require_number(path, "lora_alpha", config.get("lora_alpha"))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {key} must map module names to numbers. {_ADVICE}")
        for pattern, value in patterns.items():
            if not re.fullmatch(r"\^?[\w.\-]+", pattern):
                raise CheckpointError(
                    f"{path}: {key} has {pattern!r}; only names of modules, no expressions, are read. {_ADVICE}"
                )
            _require_number(path, f"{key}[{pattern!r}]", value)
    return config


def _require_number(path: Path, what: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {what} is {value!r}, not a positive number. {_ADVICE}")


def _pick(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that is the module's name, or its end after a dot; ``^`` pins a key to the start."""
    for key, value in (patterns or {}).items():
        pinned = key.removeprefix("^")
        if module == pinned or (key == pinned and module.endswith(f".{key}")):
            return value
    return default


# ── matching the adapter to its base ──────────────────────────────────────────────────────────────────────────────────


def _match(base: Checkpoint, adapter: Checkpoint, config: dict[str, Any]) -> tuple[dict[str, Update], dict[str, str]]:
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for key in adapter.specs:
        _refuse_unknown(key, adapter)
        name = key.removeprefix(_PREFIX)
        for kind in ("lora_A", "lora_B"):
            if name.endswith(f".{kind}.weight"):
                factors.setdefault(name.removesuffix(f".{kind}.weight"), {})[kind] = key
                break
        else:
            _require_fit(base, name, adapter, key)
            replaced[name] = key
    updates = {f"{module}.weight": _update(base, adapter, config, module, pair) for module, pair in factors.items()}
    for name in updates.keys() & replaced.keys():
        raise CheckpointError(f"{adapter.origin}: both adapts and replaces {name!r}. {_ADVICE}")
    return updates, replaced


def _refuse_unknown(key: str, adapter: Checkpoint) -> None:
    known = {
        "lora_magnitude_vector": "DoRA",
        "lora_embedding_": "LoRA of an embedding",
        "lora_B.bias": "a LoRA bias",
        "lora_A.bias": "a LoRA bias",
    }
    for part, what in known.items():
        if part in key:
            raise CheckpointError(f"{adapter.origin}: {key!r} is {what}, which is not understood. {_ADVICE}")
    if not key.startswith(_PREFIX):
        raise CheckpointError(f"{adapter.origin}: {key!r} does not begin with {_PREFIX!r}; is it a PEFT adapter? {_ADVICE}")


def _require_fit(base: Checkpoint, name: str, adapter: Checkpoint, key: str) -> None:
    if name not in base.specs:
        raise CheckpointError(
            f"{adapter.origin}: {key!r} matches no tensor of {base.origin}.{did_you_mean(name, base.specs)} {_BASE}"
        )
    if adapter.specs[key].shape != base.specs[name].shape:
        raise CheckpointError(
            f"{adapter.origin}: {key!r} {adapter.specs[key]} does not fit {name!r} {base.specs[name]} of {base.origin}. {_BASE}"
        )


def _update(base: Checkpoint, adapter: Checkpoint, config: dict[str, Any], module: str, pair: dict[str, str]) -> Update:
    name = f"{module}.weight"
    if len(pair) < 2:
        raise CheckpointError(
            f"{adapter.origin}: {module!r} has {', '.join(pair)} but not its partner. Download or export it again."
        )
    if name not in base.specs:
        raise CheckpointError(
            f"{adapter.origin}: adapts {name!r}, which {base.origin} lacks.{did_you_mean(name, base.specs)} {_BASE}"
        )
    weight, a, b = base.specs[name], adapter.specs[pair["lora_A"]], adapter.specs[pair["lora_B"]]
    if {len(weight.shape), len(a.shape), len(b.shape)} != {2}:
        raise CheckpointError(f"{adapter.origin}: {name!r} {weight} with A {a} and B {b} is no linear layer. {_ADVICE}")
    if not all(spec.dtype.is_floating_point for spec in (weight, a, b)):
        raise CheckpointError(f"{adapter.origin}: {name!r} {weight} with A {a} and B {b} is not floating-point. {_ADVICE}")
    rank = _pick(config.get("rank_pattern"), module, config["r"])
    shape = weight.shape[::-1] if config.get("fan_in_fan_out") else weight.shape
    if (b.shape[0], a.shape[1]) != shape or (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(f"{adapter.origin}: {name!r} {weight} does not fit A {a} and B {b} of rank {rank}. {_BASE}")
    alpha = _pick(config.get("alpha_pattern"), module, config["lora_alpha"])
    return Update(pair["lora_A"], pair["lora_B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
