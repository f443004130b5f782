"""PEFT folders of LoRA adapters, by themselves: their config, their factors, and what else they hold.

Whatever a config asks for and we do not understand is refused by name: a merge that silently leaves out a part of an
adapter is worse than none.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

from torch import Tensor

from eutectic.checkpoint._files import inside, read_json
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
ADVICE = "Merge the adapter with PEFT (merge_and_unload), save that, and open it instead."

#: what our arithmetic honours, or checks by itself
_READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "bias", "init_lora_weights"),
}
#: what says where the adapter came from or how it was trained; its effect is all in the weights
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
#: initialisations that leave the base alone; others (PiSSA, OLoRA, LoftQ, CorDA …) shift it, and W + s·B·A is then wrong
_INITS = {True, False, None, "gaussian", "eva", "orthogonal"}

#: how the names of the factors of one weight end, by what they are
_ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
}


class Target(NamedTuple):
    """One adapted weight: the names of A, B and DoRA's m in the file, s, and whether the weight lies transposed, as (B·A)ᵀ."""

    a: str
    b: str
    magnitude: str | None
    scale: float
    turned: bool


@final
class Adapter:
    """A LoRA adapter without its base: for each weight that it adapts s·B and A, as matrices in PEFT's orientation.

    ``targets`` are by the names of the base's weights; ``replaced`` are whole tensors (``modules_to_save``, biases), by the
    name in the base the name in the file.  It owns the file.
    """

    def __init__(self, file: Checkpoint, config: dict[str, Any], folder: Path = Path()) -> None:
        """Sort the tensors of the file.  Raises CheckpointError for one that is not understood, or not as the config says."""
        self.file, self.config, self.folder = file, config, folder
        self.origin, self.files = file.origin, file.files
        self.targets, self.replaced = _sorted(file, config)

    @property
    def base_name(self) -> str | None:
        """What the config says it was trained on: a path, or an id of the hub."""
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a target; of a convolution, the inputs are those of one window."""
        a, b = (self.file.specs[key] for key in self.targets[name][:2])
        return b.shape[0], a.numel // a.shape[0]

    def rank(self, name: str) -> int:
        """Columns of B."""
        return self.file.specs[self.targets[name].a].shape[0]

    def left(self, name: str, rows: slice | None = None) -> Tensor:
        """s·B ``[out, r]``, or some of its rows, in float32."""
        target = self.targets[name]
        return self.file.read(target.b, rows).float().flatten(1) * target.scale

    def right(self, name: str) -> Tensor:
        """A ``[r, in]`` in float32."""
        return self.file.read(self.targets[name].a).float().flatten(1)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_adapter(folder: str | Path) -> Adapter:
    """The LoRA adapter in a PEFT folder, without its base.  Raises CheckpointError for whatever is not understood."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: is no PEFT folder, it has no {CONFIG_FILE}. Check the path.")
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder}: adapter_model.bin is a pickle, which can run code. Save the adapter as {WEIGHTS_FILE}."
        )
    config = _config(inside(folder, CONFIG_FILE))
    adapter = Adapter(SafetensorsFile(inside(folder, WEIGHTS_FILE)), config, folder)
    adapter.files = (*adapter.file.files, folder / CONFIG_FILE)
    return adapter


def config_of(ranks: Mapping[str, int], like: Mapping[str, Any], replaced: Iterable[str] = ()) -> dict[str, Any]:
    """The config of an adapter with these ranks, by weight, all with s = 1; where it came from is said as ``like`` says it.

    ``replaced`` are the base's tensors that it holds as a whole.
    """
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    (most, _), *_ = Counter(modules.values()).most_common(1)
    odd = {f"^{module}": rank for module, rank in modules.items() if rank != most}
    kept = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out")
    whole = {name.rpartition(".")[0] for name in replaced if not name.endswith(".bias")}
    biases = any(name.rpartition(".")[0] not in whole for name in replaced)
    return {
        "peft_type": "LORA",
        **{key: like[key] for key in kept if like.get(key)},
        **{"r": most, "lora_alpha": most, "lora_dropout": 0.0, "bias": "all" if biases else "none", "inference_mode": True},
        **{"rank_pattern": odd, "alpha_pattern": odd, "target_modules": sorted(modules)},
        "modules_to_save": sorted(whole) or None,
    }


def replaced_key(name: str, targets: Container[str]) -> str:
    """PEFT's name of a tensor of the base that an adapter with these targets replaces as a whole."""
    module, _, parameter = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{parameter}" if f"{module}.weight" in targets else f"{PREFIX}{name}"


# ── the config ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is understood. {ADVICE}")
    for key, value in config.items():
        if value and key not in _READ | _NEUTRAL:
            raise CheckpointError(f"{path}: {key!r} is {str(value)[:60]}, which is not understood. {ADVICE}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; 'none', 'all' and 'lora_only' are understood. {ADVICE}")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise CheckpointError(f"{path}: init_lora_weights is {init!r}, which shifts the base's own weights. {ADVICE}")
    _require_number(path, "r", config.get("r"))
    _require_number(path, "lora_alpha", config.get("lora_alpha"))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {key} must map module names to numbers. {ADVICE}")
        for pattern, value in patterns.items():
            if not re.fullmatch(r"\^?[\w.\-]+", pattern):
                raise CheckpointError(
                    f"{path}: {key} has {pattern!r}; only names of modules, no expressions, are read. {ADVICE}"
                )
            _require_number(path, f"{key}[{pattern!r}]", value)
    return config


def _require_number(path: Path, what: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {what} is {value!r}, not a positive number. {ADVICE}")


def _pick(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that is the module's name, or its end after a dot; ``^`` pins a key to the start."""
    for key, value in (patterns or {}).items():
        pinned = key.removeprefix("^")
        if module == pinned or (key == pinned and module.endswith(f".{key}")):
            return value
    return default


# ── the tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _sorted(file: Checkpoint, config: dict[str, Any]) -> tuple[dict[str, Target], dict[str, str]]:
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for key in file.specs:
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{file.origin}: {key!r} does not begin with {PREFIX!r}; is it a PEFT adapter? {ADVICE}")
        name = key.removeprefix(PREFIX)
        for end, part in _ENDS.items():
            if name.endswith(end):
                parts.setdefault(name.removesuffix(end), {})[part] = key
                break
        else:
            plain = re.sub(r"\.(original_module|modules_to_save)\.", ".", name)
            if plain != name and f"{PREFIX}{plain}" in file.specs:
                continue  # with bias = "all" PEFT writes the biases of saved modules three times
            if ".lora_" in name:
                raise CheckpointError(f"{file.origin}: {key!r} is a part of an adapter that is not understood. {ADVICE}")
            replaced[name.replace(".base_layer.", ".")] = key  # where PEFT keeps the bias of a layer that it adapts
    targets = {f"{module}.weight": _target(file, config, module, found) for module, found in parts.items()}
    for name in targets.keys() & replaced.keys():
        raise CheckpointError(f"{file.origin}: both adapts and replaces {name!r}. {ADVICE}")
    return targets, replaced


def _target(file: Checkpoint, config: dict[str, Any], module: str, parts: dict[str, str]) -> Target:
    if not {"a", "b"} <= parts.keys():
        held = ", ".join(key.removeprefix(f"{PREFIX}{module}.") for key in parts.values())
        raise CheckpointError(f"{file.origin}: {module!r} has {held} but not its partner. Download or export it again.")
    if (magnitude := parts.get("magnitude")) is None and config.get("use_dora"):
        raise CheckpointError(f"{file.origin}: {module!r} has no lora_magnitude_vector, and use_dora is set. {ADVICE}")
    a, b = file.specs[parts["a"]], file.specs[parts["b"]]
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or any(size != 1 for size in b.shape[2:]):
        raise CheckpointError(f"{file.origin}: A {a} and B {b} of {module!r} are of no linear layer or convolution. {ADVICE}")
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        raise CheckpointError(f"{file.origin}: A {a} and B {b} of {module!r} are not floating-point. {ADVICE}")
    rank = _pick(config.get("rank_pattern"), module, config["r"])
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(f"{file.origin}: A {a} and B {b} of {module!r} are not of rank {rank}, as {CONFIG_FILE} says")
    alpha = _pick(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    embedding = parts["a"].endswith("lora_embedding_A")
    turned = embedding or (bool(config.get("fan_in_fan_out")) and len(a.shape) == 2)
    return Target(parts["a"], parts["b"], magnitude, scale, turned)
