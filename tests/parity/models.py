"""Small random models of Llama's shape: a base and its fine-tunes, in float32 (``zoo/``) and in bfloat16 (``half/``)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, WIDTH, INNER, VOCABULARY = 4, 64, 96, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EMBED, NORM, DOWN = "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
State = dict[str, Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of all tensors, as on the hub."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (WIDTH // 2, WIDTH),
            "self_attn.v_proj": (WIDTH // 2, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def _noise(seed: int, size: float, keep: float = 1.0) -> State:
    random = torch.Generator().manual_seed(seed)
    found = {name: size * torch.randn(shape, generator=random) for name, shape in shapes().items()}
    if keep < 1:
        found = {name: x * (torch.rand(x.shape, generator=random) < keep) for name, x in found.items()}
    return found


def _added(*states: State) -> State:
    return {name: sum((state[name] for state in states[1:]), start=tensor) for name, tensor in states[0].items()}


def family() -> dict[str, State]:
    """The base and its fine-tunes.

    a, b, c have something in common; x, y, z are sparse; f is far away; s and t are near, u and v very near; p and q point
    opposite ways.
    """
    base = {name: tensor + (1.0 if tensor.ndim == 1 else 0.0) for name, tensor in _noise(0, 0.05).items()}
    common = _noise(1, 0.02)
    found = {"base": base}
    found |= {name: _added(base, common, _noise(seed, 0.02)) for seed, name in enumerate("abc", 10)}
    found |= {name: _added(base, _noise(seed, 0.02, keep=0.4)) for seed, name in enumerate("xyz", 20)}
    found |= {"s": _added(base, _noise(30, 1e-4)), "t": _added(base, _noise(31, 4e-4)), "f": _added(base, _noise(32, 0.5))}
    found |= {name: _added(base, _noise(33, 2e-6), _noise(seed, 1e-6)) for seed, name in enumerate("uv", 34)}
    away = _noise(40, 0.02)
    opposite = {name: -0.5 * tensor for name, tensor in away.items()}
    return found | {"p": _added(base, away), "q": _added(base, opposite, _noise(41, 0.005))}


def oddities(family: dict[str, State]) -> dict[str, State]:
    """Models that something is wrong with, and a base and an expert with more than 10⁶ entries in their embeddings."""
    a = family["a"]
    steps = {NORM: torch.arange(1500, 1500 + WIDTH), DOWN: a[DOWN]}
    spoilt = a[DOWN].clone()
    spoilt[3, 5] = torch.nan
    found = {"ints": a | steps, "nan": a | {DOWN: spoilt}, "odd": a | {DOWN: a[DOWN][:, :-1]}}
    for name in ("base", "f"):
        random = torch.Generator().manual_seed(50)
        rows = 0.05 * torch.randn(16_500, WIDTH, generator=random)
        more = 0 if name == "base" else torch.randn(rows.shape, generator=random)
        found[f"wide-{name}"] = family[name] | {EMBED: rows + 0.5 * more}
    return found


def write(folder: Path, state: State, **config: object) -> None:
    """A folder as on the hub."""
    folder.mkdir(parents=True)
    dtype = next(iter(state.values())).dtype
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": str(dtype).removeprefix("torch.")} | config))


def write_all(root: Path) -> None:
    """``root/zoo/NAME`` in float32 and, but for the odd ones, ``root/half/NAME`` in bfloat16."""
    models = family()
    for name, state in models.items():
        write(root / "zoo" / name, state)
        write(root / "half" / name, {key: tensor.bfloat16() for key, tensor in state.items()})
    for name, state in oddities(models).items():
        write(root / "zoo" / name, state, vocab_size=len(state[EMBED]))
