"""The config.json of a mixture, made of its base's; and which architecture of mixtures fits a base.

A key that a config leaves out means another number in another architecture (Mixtral's rotary base is 10⁶, Llama's 10⁴), so what
the dense model takes for granted is written out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import LayoutError, did_you_mean
from eutectic.merge.upcycle import FAMILIES, Expert, Family

#: what each dense architecture takes for granted, where its mixture does not
_GRANTED: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096, "head_dim": 128},
}
_THETA = 10_000.0
#: keys that mean nothing to the mixture, or something else
_DROPPED = {
    "mixtral": ("attention_bias", "mlp_bias", "pretraining_tp", "layer_types"),
    "qwen2_moe": (),
    "qwen3_moe": ("layer_types", "max_window_layers"),
}


def family_for(config: Mapping[str, Any], base: Checkpoint, wanted: str | None = None) -> Family:
    """The architecture of mixtures that fits a base, or the one that is ``wanted`` if that does.

    ``wanted`` is the beginning of a name, as mergekit has it: ``mixtral``, ``qwen``, ``qwen3``.  Raises LayoutError.
    """
    dense = config.get("model_type")
    fitting = next((family for family in FAMILIES if dense in family.dense), None)
    known = [family.name for family in FAMILIES]
    if wanted is None:
        if fitting is None:
            kinds = ", ".join(kind for family in FAMILIES for kind in family.dense)
            raise LayoutError(f"{base.origin}: no mixture is made of {dense!r} models. Known: {kinds}.")
        return fitting
    word = re.sub(r"[\s_-]", "", wanted.lower()).replace("qwen2", "qwen")
    if word and "deepseekmoe".startswith(word):
        raise LayoutError(f"architecture {wanted!r}: its models run code from their repository, which is never loaded")
    chosen = next((family for family in FAMILIES if word and family.name.replace("_", "").startswith(word)), None)
    if chosen is None:
        raise LayoutError(f"no architecture of mixtures is called {wanted!r}.{did_you_mean(wanted, known)}")
    if chosen is not fitting:
        instead = f"Leave `architecture` out, or say {fitting.name!r}." if fitting else "Choose another base."
        raise LayoutError(
            f"{base.origin}: is a {dense!r} model, and a {chosen.title} is made of {' or '.join(chosen.dense)} ones. {instead}"
        )
    return chosen


def mixture_config(
    family: Family, config: Mapping[str, Any], *, experts: int, active: int, width: int, shared: Expert | None
) -> dict[str, Any]:
    """A mixture's config.json from its base's: ``experts`` in all, of ``width`` neurons, ``active`` for a token.

    Raises LayoutError if the base slides its attention's window in a way that the mixture cannot.
    """
    found = dict(config)
    for key, value in _GRANTED[str(config["model_type"])].items():
        found.setdefault(key, value)
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found.get("num_attention_heads", 32)
    _write_rotary_base(found)
    _write_windows(family, found)
    found = {key: value for key, value in found.items() if key not in _DROPPED[family.model_type]}
    found |= {"architectures": [family.architecture], "model_type": family.model_type, "num_experts_per_tok": active}
    found |= {"output_router_logits": False}
    if family.model_type == "mixtral":
        return found | {"num_local_experts": experts, "intermediate_size": width}
    found |= {"num_experts": experts, "moe_intermediate_size": width, "norm_topk_prob": True}
    found |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return found | ({"shared_expert_intermediate_size": shared.width} if shared is not None else {})


def _write_rotary_base(config: dict[str, Any]) -> None:
    """Say the rotary base in all places where some version of transformers looks."""
    inner = config.get("rope_parameters")
    theta = (inner.get("rope_theta") if isinstance(inner, Mapping) else None) or config.get("rope_theta") or _THETA
    config["rope_theta"] = theta
    if isinstance(inner, Mapping):
        config["rope_parameters"] = {**inner, "rope_theta": theta}


def _write_windows(family: Family, config: dict[str, Any]) -> None:
    """Say which layers see a window only, as the dense model has it."""
    dense, window = config["model_type"], config.get("sliding_window")
    if dense in ("llama", "mistral"):
        config["sliding_window"] = None if dense == "llama" else window
        return
    if not (config.get("use_sliding_window") and window):
        return
    count, first = int(config["num_hidden_layers"]), config["max_window_layers"]
    kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    config["layer_types"] = kinds
    if family.model_type == "qwen3_moe":
        if len(set(kinds)) > 1:
            raise LayoutError(f"some layers of the base see a window of {window} tokens only, and a {family.title} has no such")
        if kinds[0] == "full_attention":
            config["use_sliding_window"] = False
