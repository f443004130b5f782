"""Recipes of the kinds that are about (soup, slices, union, stack, modules, stream), over models with tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.parity.models import EMBED, VOCABULARY, WIDTH, State, family, write
from torch import Tensor

VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vision_config": {"model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2},
}
ADAPTED = "model.layers.1.self_attn.q_proj"
WORDS = [f"t{i}" for i in range(VOCABULARY)]
OF = {
    "chat-7b": "a",
    "math-7b": "b",
    "code-7b": "c",
    "run-a": "a",
    "run-b": "b",
    "run-c": "c",
    "safety-7b": "x",
    "base-7b": "base",
}

SOUP = """
merge_method: linear
models:
  - model: org/chat-7b
    parameters: {weight: 1.0}
  - model: org/math-7b
    parameters: {weight: [0.0, 0.4, 1.0]}
  - model: org/code-7b
    parameters:
      weight:
        - {filter: self_attn, value: [0.2, 0.6]}
        - {filter: mlp, value: 0.5}
        - {value: 0.1}
parameters: {normalize: true}
dtype: float32
out_dtype: bfloat16
"""
SLERP = """
merge_method: slerp
base_model: org/chat-7b
slices:
  - sources:
      - {model: org/chat-7b, layer_range: [0, 2]}
      - {model: org/math-7b, layer_range: [0, 2]}
    parameters:
      t:
        - {filter: self_attn, value: [0.1, 0.4, 0.8]}
        - {filter: mlp, value: [0.9, 0.6, 0.2]}
        - {value: 0.5}
  - sources:
      - {model: org/chat-7b, layer_range: [2, 4]}
      - {model: org/math-7b, layer_range: [2, 4]}
parameters: {t: 0.35}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""
# density 1: the random numbers of two programs differ
UNION = """
merge_method: dare_ties
base_model: org/base-8b
models:
  - model: org/base-8b
  - model: org/instruct-8b
    parameters: {density: 1, weight: 0.4}
  - model: org/chatml-8b
    parameters: {density: [1, 1], weight: 0.3}
  - model: org/base-8b+org/med-lora
    parameters: {density: 1, weight: 0.2}
parameters: {normalize: false, int8_mask: true, rescale: true, lambda: 1.0}
dtype: float32
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: org/chatml-8b}
    <|eot_id|>: {source: org/instruct-8b, force: true}
    <|tool|>: {source: {kind: model_token, model: org/instruct-8b, token: "<|eom_id|>"}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
chat_template: auto
"""
STACK = """
merge_method: passthrough
slices:
  - sources: [{model: org/chat-7b, layer_range: [0, 3]}]
  - sources:
      - model: org/math-7b
        layer_range: [1, 4]
        parameters:
          scale: [{filter: o_proj, value: 0.7071}, {filter: down_proj, value: 0.7071}, {value: 1.0}]
dtype: float32
out_dtype: bfloat16
"""
STREAM = """
name: soup
merge_method: model_stock
base_model: org/base-7b
models: [{model: org/run-a}, {model: org/run-b}, {model: org/run-c}]
parameters: {filter_wise: false}
dtype: float32
---
name: trimmed
merge_method: breadcrumbs_ties
base_model: org/base-7b
models:
  - {model: soup, parameters: {weight: 0.7, density: 0.9, gamma: 0.01}}
  - {model: org/code-7b, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
dtype: float32
---
merge_method: della
base_model: org/base-7b
models:
  - {model: trimmed, parameters: {weight: 1.0, density: 1, epsilon: 0.1}}
  - {model: org/safety-7b, parameters: {weight: 0.3, density: 1, epsilon: 0.1}}
parameters: {lambda: 1.1, normalize: true, rescale: true}
dtype: float32
"""
MODULES = """
merge_method: task_arithmetic
base_model: vl/base
modules:
  text_decoder:
    models:
      - {model: vl/math, parameters: {weight: 0.6}}
      - {model: vl/ocr, parameters: {weight: 0.5}}
    parameters: {lambda: 0.8}
  multi_modal_projector:
    models: [{model: vl/ocr, parameters: {weight: 1.0}}]
  vision_tower:
    models: [{model: vl/ocr, parameters: {weight: 0.0}}]
parameters: {normalize: false}
dtype: float32
"""
SHAPES = {
    "shape-soup": SOUP,
    "shape-slerp": SLERP,
    "shape-union": UNION,
    "shape-stack": STACK,
    "shape-modules": MODULES,
    "shape-stream": STREAM,
}


def write_all(root: Path) -> None:
    """``root/org/NAME``: fine-tunes with one vocabulary, two that have tokens of their own, and an adapter."""
    models = family()
    for name, of in OF.items():
        write(root / "org" / name, models[of])
        write_tokenizer(root / "org" / name, [])
    own = {
        "base-8b": ("base", []),
        "instruct-8b": ("a", ["<|eot_id|>", "<|eom_id|>"]),
        "chatml-8b": ("b", ["<|im_start|>", "<|im_end|>"]),
    }
    for seed, (name, (of, more)) in enumerate(own.items(), 60):
        write(root / "org" / name, extended(models[of], len(more), seed), vocab_size=VOCABULARY + len(more))
        write_tokenizer(root / "org" / name, more)
    write_adapter(root / "org/med-lora", root / "org/base-8b")
    for seed, name in enumerate(("base", "math", "ocr")):
        write_vl(root / "vl" / name, seed)


def extended(state: State, count: int, seed: int) -> State:
    """A model with more rows in its embeddings and its head."""
    random = torch.Generator().manual_seed(seed)

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, 0.05 * torch.randn(count, WIDTH, generator=random)])

    return {name: longer(tensor) if name in (EMBED, "lm_head.weight") else tensor for name, tensor in state.items()}


def write_tokenizer(folder: Path, more: list[str]) -> None:
    """Whole words, and special tokens after them."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": VOCABULARY + i, "content": token} | special for i, token in enumerate(more)]
    vocabulary = {word: i for i, word in enumerate([*WORDS, *more])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    whole = {"version": "1.0", **empty, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": added, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def write_vl(folder: Path, seed: int) -> None:
    """A Qwen2.5-VL of two layers and two blocks, by its names on the hub."""
    text, sees = "model.layers", "visual.blocks"
    shapes = {"model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32), "model.norm.weight": (32,)}
    for i in range(2):
        shapes |= {f"{text}.{i}.self_attn.{x}_proj.weight": (n, 32) for x, n in (("q", 32), ("k", 16), ("v", 16), ("o", 32))}
        shapes |= {f"{text}.{i}.self_attn.{x}_proj.bias": (n,) for x, n in (("q", 32), ("k", 16), ("v", 16))}
        for stack, bias in ((text, False), (sees, True)):
            for part, (rows, columns) in {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}.items():
                shapes[f"{stack}.{i}.mlp.{part}_proj.weight"] = (rows, columns)
                shapes |= {f"{stack}.{i}.mlp.{part}_proj.bias": (rows,)} if bias else {}
        shapes |= {f"{text}.{i}.{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        shapes |= {f"{sees}.{i}.norm{j}.weight": (32,) for j in (1, 2)}
        for part, n in (("qkv", 96), ("proj", 32)):
            shapes |= {f"{sees}.{i}.attn.{part}.weight": (n, 32), f"{sees}.{i}.attn.{part}.bias": (n,)}
    for part, rows in ((0, 128), (2, 32)):
        shapes |= {f"visual.merger.mlp.{part}.weight": (rows, 128), f"visual.merger.mlp.{part}.bias": (rows,)}
    shapes |= {"visual.merger.ln_q.weight": (32,), "visual.patch_embed.proj.weight": (32, 3, 2, 4, 4)}
    random = torch.Generator().manual_seed(70)
    base = {name: 0.05 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    random.manual_seed(70 + seed)
    more = 0.02 if seed else 0.0
    state = {name: tensor + more * torch.randn(tensor.shape, generator=random) for name, tensor in base.items()}
    write(folder, state, **VL)


def write_adapter(folder: Path, base: Path) -> None:
    """A PEFT folder with one adapted matrix."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(9)
    down, up = (torch.randn(shape, generator=random) / 10 for shape in ((2, WIDTH), (WIDTH, 2)))
    prefix = f"base_model.model.{ADAPTED}"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    layers = {"layers_to_transform": [1], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | layers))
