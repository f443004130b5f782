"""mergekit's YAML as it is: the seven shapes of recipes, the numbers that each tensor gets, and what is refused, by line."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil

import pytest
import torch
from tests.merge.conftest import write_model

import eutectic as eu
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.save import save_tensors
from eutectic.errors import CheckpointError, EutecticError, LayoutError, ParameterError, RecipeError, UnknownNameError
from eutectic.merge.compose import Composed
from eutectic.merge.mergekit import TokenizerSpec, parse_mergekit
from eutectic.merge.recipe import Recipe, load
from eutectic.merge.run import save, verify
from eutectic.merge.slices import Origin, assigned, depths, main_stacks, relayered, stacks_of
from eutectic.merge.view import Merged

LAYERS = 4
Q = "model.layers.{}.self_attn.q_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
TOKENS = [*(f"t{i}" for i in range(28)), "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"]
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="session")
def llama():
    """The config and state dict of a Llama of four layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, {k: v.clone() for k, v in model.state_dict().items()}


def tuned(base, seed, size=0.02):
    random = torch.Generator().manual_seed(seed)
    return {name: tensor + size * torch.randn(tensor.shape, generator=random) for name, tensor in base.items()}


@pytest.fixture(scope="session")
def zoo(llama, tmp_path_factory):
    """A folder of models, and their state dicts; ``org/base-7b`` is what the others are fine-tunes of."""
    root = tmp_path_factory.mktemp("zoo")
    config, base = llama
    models = {"org/base-7b": base}
    for seed, name in enumerate(("chat-7b", "math-7b", "code-7b", "math-7b@v1.2", "run-a", "run-b", "run-c", "safety-7b"), 1):
        models[f"org/{name}"] = tuned(base, seed)
    for name, tensors in models.items():
        (root / name).mkdir(parents=True)
        save_tensors(Memory(tensors), root / name)
        (root / name / "config.json").write_text(json.dumps(config, default=str))
        (root / name / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": VOCABULARY}}))
    return root, models


@pytest.fixture
def opened(zoo):
    """A function that opens a recipe beside the models."""
    root, _ = zoo
    held = []

    def open_recipe(text, compat=False):
        held.append(parse_mergekit(text, "mk.yaml", compat).open(root))
        return held[-1]

    yield open_recipe
    for composed in held:
        composed.close()


def numbers(composed, name):
    """The method and parameters that a tensor is merged with."""
    (merged,) = (merged for merged in composed.merges if name in merged.specs)
    return merged.method, json.loads(merged._keys[name])


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=2e-6)


# ── the seven shapes ──────────────────────────────────────────────────────────────────────────────────────────────────

SOUP = """
merge_method: linear
models:
  - model: org/chat-7b
    parameters: {weight: 1.0}
  - model: org/math-7b@v1.2
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
dtype: bfloat16
tokenizer_source: base
"""
DARE = """
merge_method: dare_ties
base_model: org/base-7b
models:
  - model: org/base-7b
  - model: org/run-a
    parameters: {density: 0.53, weight: 0.4}
  - model: org/chat-7b
    parameters: {density: [0.7, 0.4], weight: 0.3}
  - model: org/base-7b+org/med-lora
    parameters: {density: 0.5, weight: 0.2}
parameters: {normalize: false, int8_mask: true, rescale: true, lambda: 1.0}
dtype: bfloat16
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: org/chat-7b}
    <|eot_id|>: {source: org/run-a, force: true}
    <|tool|>: {source: {kind: model_token, model: org/run-a, token: "<|eom_id|>"}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
chat_template: auto
"""
UPSCALE = """
merge_method: passthrough
slices:
  - sources: [{model: org/chat-7b, layer_range: [0, 3]}]
  - sources:
      - model: org/math-7b
        layer_range: [1, 4]
        parameters:
          scale: [{filter: o_proj, value: 0.7071}, {filter: down_proj, value: 0.7071}, {value: 1.0}]
dtype: bfloat16
"""
VLM = """
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
dtype: bfloat16
"""
STREAM = """
name: soup
merge_method: model_stock
base_model: org/base-7b
models: [{model: org/run-a}, {model: org/run-b}, {model: org/run-c}]
parameters: {filter_wise: false}
dtype: bfloat16
---
name: trimmed
merge_method: breadcrumbs_ties
base_model: org/base-7b
models:
  - {model: soup, parameters: {weight: 0.7, density: 0.9, gamma: 0.01}}
  - {model: org/code-7b, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
dtype: bfloat16
---
merge_method: della
base_model: org/base-7b
models:
  - {model: trimmed, parameters: {weight: 1.0, density: 0.6, epsilon: 0.1}}
  - {model: org/safety-7b, parameters: {weight: 0.3, density: 0.5, epsilon: 0.1}}
parameters: {lambda: 1.1, normalize: true, rescale: true}
dtype: bfloat16
"""
MOE = """
base_model: org/chat-7b
gate_mode: hidden
experts_per_token: 1
experts:
  - source_model: org/math-7b
    positive_prompts: ["Solve the equation"]
"""


def test_a_soup_with_gradients_and_filters(opened, zoo):
    composed, models = opened(SOUP), zoo[1]
    chat, math7, code = models["org/chat-7b"], models["org/math-7b@v1.2"], models["org/code-7b"]
    math_of = {0: 0.0, 1: 0.4 * 2 / 3, 2: 0.4 + 0.6 / 3, 3: 1.0}  # two pieces over four layers
    wanted = {EMBED: (0.0, 0.1), NORM: (1.0, 0.1), HEAD: (1.0, 0.1)}
    for i in range(LAYERS):
        wanted |= {Q.format(i): (math_of[i], 0.2 + 0.4 * i / 3), DOWN.format(i): (math_of[i], 0.5)}
        wanted[f"model.layers.{i}.input_layernorm.weight"] = (math_of[i], 0.1)
    for name, (b, c) in wanted.items():
        mean = (chat[name].double() + b * math7[name].double() + c * code[name].double()) / (1 + b + c)
        found = composed.read(name)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), mean, rtol=2**-8, atol=1e-9)
        method, parameters = numbers(composed, name)
        assert method == "average"
        assert parameters["weights"] == pytest.approx([1.0, b, c])
    assert list(composed.specs) == list(chat)


def test_the_head_takes_the_first_value_under_compat(opened):
    for name, first in ((EMBED, 0.0), (HEAD, 0.0), (NORM, 0.0), (Q.format(3), 1.0)):
        assert numbers(opened(SOUP, compat=True), name)[1]["weights"][1] == first


def slerp(a, b, t):
    a, b = a.double(), b.double()
    omega = torch.acos(((a / a.norm()) * (b / b.norm())).sum().clamp(-1, 1))
    return ((1 - t) * a + t * b) if omega < 1e-6 else (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / omega.sin()


def test_slerp_by_slices(opened, zoo):
    composed, models = opened(SLERP.replace("dtype: bfloat16", "dtype: float32")), zoo[1]
    t = {EMBED: 0.5, HEAD: 0.35, NORM: 0.35}  # embeddings belong to the first slice, norm and head to the last
    t |= {Q.format(0): 0.1, Q.format(1): 0.8, DOWN.format(0): 0.9, DOWN.format(1): 0.2, Q.format(2): 0.35, DOWN.format(3): 0.35}
    for name, value in t.items():
        close(composed.read(name), slerp(models["org/chat-7b"][name], models["org/math-7b"][name], value))
    assert set(composed.specs) == set(models["org/chat-7b"])
    assert parse_mergekit(SLERP).result.tokenizer == TokenizerSpec("base")
    assert composed.tokenizer.vocabulary.tokens == VOCABULARY


def write_lora(folder, base, rank=2, alpha=4):
    random = torch.Generator().manual_seed(9)
    prefix = "base_model.model."
    a, b = torch.randn(rank, 16, generator=random) / 10, torch.randn(16, rank, generator=random) / 10
    module = Q.format(1).removesuffix(".weight")
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(Memory({f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}), folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return alpha / rank * b @ a


def test_dare_ties_with_an_adapter_and_a_tokenizer(opened, zoo):
    root, models = zoo
    delta = write_lora(root / "org/med-lora", "../base-7b")
    composed = opened(DARE)
    for name, second in ((EMBED, 0.7), (Q.format(0), 0.7), (Q.format(1), 0.6), (HEAD, 0.4)):
        method, found = numbers(composed, name)
        assert method == "generalized_task_arithmetic"  # `normalize: false` adds, where the paper's averages
        assert found["density"] == pytest.approx([0.53, second, 0.5])
        assert found["weights"] == [0.4, 0.3, 0.2]
        assert (found["prune"], found["rescale"], found["votes"], found["combine"]) == ("random", "probability", "plain", "sum")
    assert list(composed.inputs) == ["org/base-7b", "org/run-a", "org/chat-7b", "org/base-7b+org/med-lora"]
    lora = composed.inputs["org/base-7b+org/med-lora"]
    close(lora.read(Q.format(1)), models["org/base-7b"][Q.format(1)] + delta)
    assert composed.chat_template is None
    assert any("no model has a chat template" in note for note in composed.notes)
    assert composed.specs[EMBED].shape == composed.specs[HEAD].shape == (64, 16)
    assert composed.tokenizer.vocabulary.tokens == VOCABULARY | {"<|tool|>": 32, "<|unused|>": 33}
    torch.testing.assert_close(  # all models start from the row that the rule names
        composed.read(EMBED)[32], models["org/run-a"][EMBED][31].bfloat16(), rtol=2**-7, atol=0
    )
    assert not composed.read(EMBED)[33].any()
    assert parse_mergekit(DARE).result.tokenizer == TokenizerSpec(
        "union",
        {
            "<|im_start|>": {"source": "org/chat-7b"},
            "<|eot_id|>": {"source": "org/run-a", "force": True},
            "<|tool|>": {"source": {"kind": "model_token", "model": "org/run-a", "token": "<|eom_id|>"}},
            "<|unused|>": {"source": {"kind": "zero"}},
        },
        64,
    )
    assert any("mk.yaml:12: `int8_mask` is ignored" in note for note in composed.notes)
    compat = numbers(opened(DARE, compat=True), HEAD)[1]
    assert (compat["rescale"], compat["votes"], compat["density"][1]) == ("l1", "weighted", 0.7)


def test_a_copy_for_another_machine_reads_the_same(opened, zoo):
    write_lora(zoo[0] / "org/med-lora", "../base-7b")
    composed = opened(DARE)
    with pickle.loads(pickle.dumps(composed)) as copy:
        assert all(torch.equal(copy.read(name), composed.read(name)) for name in composed.specs)


def test_depth_upscaling_loads_in_transformers(opened, zoo, tmp_path):
    models = zoo[1]
    composed = opened(UPSCALE)
    out = save(composed, tmp_path / "out", recipe=parse_mergekit(UPSCALE))
    found = eu.state_dict(out)
    chat, math7 = models["org/chat-7b"], models["org/math-7b"]
    for i, (model, j) in enumerate([(chat, 0), (chat, 1), (chat, 2), (math7, 1), (math7, 2), (math7, 3)]):
        assert torch.equal(found[Q.format(i)], model[Q.format(j)].bfloat16())
        scale = 0.7071 if i >= 3 else 1.0
        assert torch.equal(found[DOWN.format(i)], (scale * model[DOWN.format(j)]).bfloat16())
    assert torch.equal(found[EMBED], chat[EMBED].bfloat16())
    assert torch.equal(found[HEAD], math7[HEAD].bfloat16())
    assert verify(out) == []

    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 6
    assert torch.equal(model.state_dict()[DOWN.format(5)], found[DOWN.format(5)])


@pytest.fixture
def vl(zoo):
    """A model that sees: names as on the hub for Qwen2.5-VL."""
    root, _ = zoo
    random = torch.Generator().manual_seed(3)
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "visual.patch_embed.proj.weight"]
    names += [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + [
        f"visual.blocks.{i}.attn.qkv.weight" for i in range(2)
    ]
    names += ["visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", "visual.merger.ln_q.weight"]
    base = {name: torch.randn(4, 3, generator=random) for name in names}
    found = {"base": base, "math": tuned(base, 11, 0.5), "ocr": tuned(base, 12, 0.5)}
    for name, tensors in found.items():
        if not (root / "vl" / name).exists():
            folder = write_model(root / "vl" / name, tensors)
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "of": name}))
    return found


def test_modules(opened, vl):
    composed = opened(VLM.replace("dtype: bfloat16", "dtype: float32"))
    base, math7, ocr = vl["base"], vl["math"], vl["ocr"]
    for name in base:
        found = composed.read(name)
        if name.startswith("visual.merger"):
            close(found, ocr[name])
        elif name.startswith("visual."):
            close(found, base[name])
        else:
            close(found, base[name] + 0.8 * (0.6 * (math7[name] - base[name]) + 0.5 * (ocr[name] - base[name])))
    assert set(composed.specs) == set(base)


def test_towers_that_are_not_listed_stay_and_are_noted(opened, vl):
    text = re.sub(r"  multi_modal(.|\n)*(?=parameters: {norm)", "", VLM).replace("dtype: bfloat16", "dtype: float32")
    composed = opened(text)
    assert set(composed.specs) == set(vl["base"])
    assert torch.equal(composed.read("visual.merger.ln_q.weight"), vl["base"]["visual.merger.ln_q.weight"])
    assert any(re.search(r"mk.yaml:4: in no module.*vl/base: visual\.\S+ and 5 more", note) for note in composed.notes)


def test_a_stream_of_documents(opened, zoo, tmp_path):
    models = zoo[1]
    whole = opened(STREAM)
    base, parts = models["org/base-7b"], STREAM.split("---\n")
    soup = eu.state_dict(opened(parts[0].replace("name: soup", "")))
    runs = [models[f"org/run-{x}"][HEAD] for x in "abc"]
    deltas = [(run - base[HEAD]).double().flatten() for run in runs]
    cos = sum(float(deltas[i] @ deltas[j] / deltas[i].norm() / deltas[j].norm()) for i, j in ((0, 1), (0, 2), (1, 2)))
    cos = max(0.0, cos / 3)
    t = 3 * cos / (1 + 2 * cos)
    mean = t * torch.stack(runs).double().mean(0) + (1 - t) * base[HEAD].double()
    torch.testing.assert_close(soup[HEAD].double(), mean, rtol=2**-7, atol=1e-6)
    # the same by hand, a document after the other: no temporary files, and not a bit of difference
    merge = {"density": 0.9, "gamma": 0.01, "weights": [0.7, 0.5], "prune": "band", "votes": "plain", "combine": "sum"}
    trimmed = eu.state_dict(
        eu.merge(
            "generalized_task_arithmetic", base, {"soup": soup, "org/code-7b": models["org/code-7b"]},
            dtype=torch.bfloat16, **merge,
        )
    )  # fmt: skip
    wanted = eu.state_dict(
        eu.merge(
            "della", base, {"trimmed": trimmed, "org/safety-7b": models["org/safety-7b"]}, dtype=torch.bfloat16,
            density=[0.6, 0.5], epsilon=0.1, weights=[1.0, 0.3], scale=1.1,
        )
    )  # fmt: skip
    assert all(torch.equal(whole.read(name), wanted[name]) for name in wanted)
    out = save(whole, tmp_path / "out", recipe=parse_mergekit(STREAM))
    about = json.loads((out / "eutectic.json").read_text())
    assert set(about["inputs"]) == {f"org/{n}" for n in ("base-7b", "run-a", "run-b", "run-c", "code-7b", "safety-7b")}
    assert all(entry["blake3"] for entry in about["inputs"].values())
    assert about["recipe_sha256"] == parse_mergekit(STREAM).sha256()
    card = (out / "README.md").read_text()
    again = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]
    assert parse_mergekit(again).sha256() == parse_mergekit(STREAM).sha256()
    for paper in ("2403.19522", "2312.06795", "2406.11617"):
        assert paper in card


def test_the_order_of_documents_does_not_matter(opened):
    first, second, third = STREAM.split("---\n")
    turned = opened("---\n".join([third, second, first]))
    assert torch.equal(turned.read(HEAD), opened(STREAM).read(HEAD))


def test_a_mixture_of_experts_stands_alone():
    with pytest.raises(RecipeError, match=r"mk\.yaml:\d+: .*stands alone"):
        parse_mergekit("merge_method: linear\nmodels: [{model: a}]\nname: x\n---" + MOE, "mk.yaml")


# ── parameters ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_precedence_is_source_slice_module_recipe(opened):
    text = """
merge_method: ties
base_model: org/base-7b
modules:
  model:
    slices:
      - sources:
          - model: org/run-a
            layer_range: [0, 4]
            parameters: {weight: [{filter: layers.0, value: 1}, {filter: layers.1.self, value: 2}]}
          - {model: org/run-b, layer_range: [0, 4]}
        parameters: {weight: [{filter: layers.0, value: 3}, {filter: layers.1, value: 4}]}
    parameters: {weight: {filter: layers.2, value: 5}, density: 0.5}
  lm_head: {models: [{model: org/run-c}]}
parameters: {weight: 6, density: 0.25, lambda: 2}
"""
    composed = opened(text)
    for name, weights in {
        Q.format(0): [1, 3],
        Q.format(1): [2, 4],
        DOWN.format(1): [4, 4],
        Q.format(2): [5, 5],
        Q.format(3): [6, 6],
        NORM: [6, 6],
        HEAD: [6],
    }.items():
        method, found = numbers(composed, name)
        assert found["weights"] == weights if method != "ties" else len(set(weights)) == 1
        assert (found["density"], found["scale"]) == (0.25 if name == HEAD else 0.5, 2)
        assert found.get("votes", "plain") == "plain"


@pytest.mark.parametrize(
    ("values", "at", "wanted"),
    [
        ("[0, 1]", (0, 1 / 3, 2 / 3, 1), None),
        ("[0, 1, 0]", (0, 2 / 3, 2 / 3, 0), None),
        ("[3]", (3, 3, 3, 3), None),
        ("3", (3, 3, 3, 3), None),
        ("{value: [1, 2]}", (1, 4 / 3, 5 / 3, 2), None),
        ("[{filter: '*', value: 7}]", (7, 7, 7, 7), None),
        ("[{filter: q_proj, value: 1}, {filter: self_attn, value: 2}, {value: 9}]", (1, 1, 1, 1), 9),
    ],
)
def test_gradients_and_filters(opened, values, at, wanted):
    composed = opened(f"merge_method: task_arithmetic\nbase_model: org/base-7b\nmodels: [{{model: org/run-a}}]\n"
                      f"parameters: {{weight: {values}}}")  # fmt: skip
    for i, value in enumerate(at):
        assert numbers(composed, Q.format(i))[1]["weights"] == pytest.approx([value])
    if wanted is not None:
        assert numbers(composed, HEAD)[1]["weights"] == [wanted]


def test_an_only_layer_of_a_slice_lies_at_one(opened):
    text = "merge_method: passthrough\nslices:\n"
    text += "".join(f"  - sources: [{{model: org/chat-7b, layer_range: [{i}, {i + 1}]}}]\n" for i in (2, 2, 0))
    composed = opened(text + "parameters: {scale: [5, 7]}")
    assert [numbers(composed, Q.format(i))[1]["scale"] for i in range(3)] == [7, 7, 7]
    assert (numbers(composed, EMBED)[1]["scale"], numbers(composed, HEAD)[1]["scale"]) == (5, 7)
    assert composed.layers == {"model.layers": Origin(4, (2, 2, 0))}


def family(method, given, k=2, **models):
    each = [
        f"  - {{model: org/run-{x}, parameters: {{weight: {w}}}}}" for x, w in zip("abc"[:k], (0.4, 0.8, -0.3), strict=False)
    ]
    return "\n".join([f"merge_method: {method}", "base_model: org/base-7b", "models:", *each, f"parameters: {given}"])


@pytest.mark.parametrize(
    ("method", "given", "ours", "parameters"),
    [
        ("task_arithmetic", "{}", "task_arithmetic", {"weights": [0.4, 0.8], "scale": 1}),
        ("task_arithmetic", "{normalize: true, lambda: 3}", "task_arithmetic", {"weights": [1 / 3, 2 / 3], "scale": 3}),
        ("ties", "{density: 0.3}", "generalized_task_arithmetic", {"prune": "magnitude", "combine": "mean", "density": 0.3}),
        ("ties", "{normalize: false}", "generalized_task_arithmetic", {"combine": "sum"}),
        ("dare_linear", "{density: 0.5}", None, {"density": 0.5, "weights": [0.4, 0.8]}),
        ("dare_ties", "{density: 0.5, normalize: true}", "dare_ties", {"density": 0.5, "weights": [0.4, 0.8], "scale": 1}),
        ("dare_ties", "{density: 0.5, rescale: false}", "generalized_task_arithmetic", {"rescale": "none"}),
        ("della", "{density: 0.5}", "della", {"density": 0.5, "epsilon": 0.15, "weights": [0.4, 0.8]}),
        ("della_linear", "{density: 0.5, epsilon: 0.1}", "della_linear", {"epsilon": 0.1, "weights": [0.4, 0.8]}),
        ("della_linear", "{density: 0.5, normalize: true}", "della_linear", {"weights": [1 / 3, 2 / 3]}),
        ("breadcrumbs", "{density: 0.5}", "breadcrumbs", {"gamma": 0.01, "weights": [0.4, 0.8], "scale": 1}),
        ("breadcrumbs", "{density: 0.5, rescale: true}", "generalized_task_arithmetic", {"rescale": "l1", "prune": "band"}),
        ("breadcrumbs_ties", "{density: 0.5, normalize: true}", "breadcrumbs_ties", {"weights": [0.4, 0.8]}),
        ("linear", "{}", "average", {"weights": [0.4, 0.8]}),
        ("linear", "{normalize: false}", "linear", {"weights": [0.4, 0.8]}),
        ("nuslerp", "{}", "nuslerp_delta", {"weights": [0.4, 0.8]}),
        ("multislerp", "{eps: 1e-6}", "multislerp_delta", {"weights": [0.4, 0.8]}),
        ("sce", None, "sce", {"density": 1}),
        ("karcher", None, "karcher", {}),
        ("model_stock", None, "model_stock", {}),
        ("ram", None, "ram", {"epsilon": 1e-5}),
        ("ramplus_tl", None, "ramplus_tl", {"r": 0.1, "alpha": 0.2}),
        ("tsv_m", None, "tsv_m", {"scale": 1}),
    ],
)
def test_methods_and_their_parameters(opened, method, given, ours, parameters):
    text = family(method, given or "{}")
    if given is None:
        text = re.sub(r", parameters: {weight: [^}]+}", "", text)
    found, values = numbers(opened(text), HEAD)
    assert found == ours or ours is None
    for key, value in parameters.items():
        assert values[key] == (pytest.approx(value) if not isinstance(value, str) else value), key
    assert values.get("over", "tensor") == "tensor"


def test_without_a_base(opened):
    text = family("nuslerp", "{}").replace("base_model: org/base-7b\n", "")
    assert numbers(opened(text), HEAD)[0] == "nuslerp"
    rows = text.replace("parameters: {}", "parameters: {nuslerp_flatten: false}")
    assert numbers(opened(rows), HEAD)[0] == "nuslerp_rows"
    multi = text.replace("nuslerp", "multislerp")
    assert numbers(opened(multi), HEAD)[0] == "multislerp"


@pytest.mark.parametrize("method", ["slerp", "nearswap", "arcee_fusion"])
def test_two_models_of_which_one_is_the_base(opened, zoo, method):
    text = f"merge_method: {method}\nbase_model: org/run-b\nmodels: [{{model: org/run-a}}, {{model: org/run-b}}]"
    if method != "arcee_fusion":
        text += "\nparameters: {t: 0.001}"
    composed = opened(text)
    a, b = (zoo[1][f"org/run-{x}"][HEAD] for x in "ab")
    if method == "slerp":
        assert list(composed.merges[0].experts) == ["org/run-b", "org/run-a"]
        close(composed.read(HEAD), slerp(b, a, 0.001))
    elif method == "nearswap":
        close(composed.read(HEAD), b + (a - b).clamp(-0.001, 0.001))
    else:
        assert list(composed.merges[0].experts) == ["org/run-b", "org/run-a"]
        found = composed.read(HEAD)
        assert bool(((found == a) | (found == b)).all())


def naive_compat(method, base, experts, weights, density, normalize, lam, keep=None):
    """mergekit's order: prune, weigh, elect on the weighted, add, divide by the weights of what was added."""
    deltas = []
    for expert, weight in zip(experts, weights, strict=True):
        delta = (expert - base).double()
        if density < 1:
            count = int(density * delta.numel())  # 204.8 are 204
            threshold = delta.abs().flatten().sort(descending=True).values[count - 1]
            delta = torch.where(delta.abs() >= threshold, delta, 0)
        deltas.append(weight * delta)
    total = sum(deltas)
    sign = torch.where(total >= 0, 1, -1)
    kept = [torch.where(delta * sign > 0, delta, 0) for delta in deltas]
    mass = sum(weight * (delta != 0) for weight, delta in zip(weights, kept, strict=True))
    merged = sum(kept)
    if normalize:
        merged = merged / torch.where(mass == 0, 1, mass)
    return base.double() + lam * merged


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_with_mergekits_conventions(opened, zoo, normalize):
    text = family("ties", f"{{density: 0.4, lambda: 1.5, normalize: {str(normalize).lower()}}}", k=3)
    composed, models = opened(text, compat=True), zoo[1]
    for name in (HEAD, Q.format(1), NORM):
        runs = [models[f"org/run-{x}"][name] for x in "abc"]
        wanted = naive_compat("ties", models["org/base-7b"][name], runs, (0.4, 0.8, -0.3), 0.4, normalize, 1.5)
        close(composed.read(name), wanted)


def test_ties_with_weights_as_in_the_paper(opened, zoo):
    composed, models = opened(family("ties", "{density: 0.4}", k=3)), zoo[1]
    base = models["org/base-7b"][HEAD].double()
    deltas = []
    for x in "abc":
        delta = models[f"org/run-{x}"][HEAD].double() - base
        threshold = delta.abs().flatten().sort(descending=True).values[round(0.4 * delta.numel()) - 1]
        deltas.append(torch.where(delta.abs() >= threshold, delta, 0))
    sign = torch.sign(sum(deltas))
    kept = [torch.where(delta * sign > 0, delta, 0) for delta in deltas]
    mass = sum(abs(w) * (d != 0) for w, d in zip((0.4, 0.8, -0.3), kept, strict=True))
    close(
        composed.read(HEAD),
        base + sum(w * d for w, d in zip((0.4, 0.8, -0.3), kept, strict=True)) / torch.where(mass > 0, mass, 1),
    )


def test_l1_rescaling_keeps_the_norm(opened, zoo):
    text = "merge_method: {}\nbase_model: org/base-7b\nmodels: [{{model: org/run-a, parameters: {{weight: 1, density: 0.3}}}}]"
    base, run = (zoo[1][f"org/{name}"][HEAD].double() for name in ("base-7b", "run-a"))
    for method in ("dare_linear", "della_linear"):
        delta = opened(text.format(method) + "\ndtype: float64", compat=True).read(HEAD) - base
        kept = delta.abs() > 1e-9
        assert 0.15 < kept.double().mean() < 0.45
        assert float(delta.abs().sum()) == pytest.approx(float((run - base).abs().sum()), rel=1e-5)
        ratio = (delta / (run - base))[kept]
        assert float(ratio.std()) < 1e-3  # one factor for all of the tensor


@pytest.mark.parametrize("prune", ["none", "magnitude", "band", "random", "rank"])
@pytest.mark.parametrize("votes", ["none", "plain", "weighted"])
def test_generalized_task_arithmetic_streams(prune, votes):
    random = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(97, 131, generator=random), "v": torch.randn(9000, generator=random)}
    experts = {str(i): Memory(tuned(base, i)) for i in range(3)}
    parameters = {"prune": prune, "density": [0.3, 0.5, 0.4], "epsilon": 0.1, "rescale": "l1", "votes": votes}
    parameters |= {"weights": [0.5, -0.2, 0.3], "scale": 1.5}
    small, large = (
        Merged("generalized_task_arithmetic", Memory(base), experts, parameters, chunk=chunk) for chunk in (4096, 1 << 20)
    )
    for name, spec in large.specs.items():
        assert torch.equal(small.read(name), large.read(name))
        assert torch.equal(small.read_flat(name, 5000, spec.numel), large.read(name).flatten()[5000:])


# ── references ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_references(opened, zoo):
    root, models = zoo
    delta = write_lora(root / "org/med-lora", "../base-7b")
    wanted = models["org/run-a"][Q.format(1)] + delta
    for model in (
        "org/run-a+org/med-lora",
        "{model: org/run-a, lora: org/med-lora}",
        "{model: {path: org/run-a}, lora: {path: org/med-lora}}",
        f"{root}/org/run-a+{root}/org/med-lora",
    ):
        composed = opened(f"merge_method: passthrough\nmodels:\n  - model: {model}")
        close(composed.read(Q.format(1)), wanted)
    dict_form = opened("merge_method: passthrough\nmodels:\n  - model: {model: {path: org/run-a}}")
    assert torch.equal(dict_form.read(HEAD), models["org/run-a"][HEAD])


@pytest.mark.parametrize("name", ["a+b", "a@b", "a@b+c@d", "a+b+c", "org@x/run+1"])
def test_local_paths_that_look_like_more_win(opened, zoo, name):
    root, models = zoo
    shutil.copytree(root / "org/run-b", root / name, dirs_exist_ok=True)
    delta = write_lora(root / "org/med-lora", "../base-7b")
    composed = opened(f"merge_method: passthrough\nmodels: [{{model: {name}}}]")
    assert torch.equal(composed.read(HEAD), models["org/run-b"][HEAD])
    adapted = opened(f"merge_method: passthrough\nmodels: [{{model: {name}+org/med-lora}}]")
    close(adapted.read(Q.format(1)), models["org/run-b"][Q.format(1)] + delta)


def test_one_model_twice_in_a_slice(opened, zoo):
    text = """
merge_method: linear
slices:
  - sources:
      - {model: org/run-a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: org/run-a, layer_range: [2, 4], parameters: {weight: 3}}
"""
    found, run = opened(text).read(Q.format(1)), zoo[1]["org/run-a"]
    close(found, (run[Q.format(1)].double() + 3 * run[Q.format(3)].double()) / 4)


def test_a_base_that_a_slice_does_not_list_follows_its_first_source(opened, zoo):
    text = """
merge_method: task_arithmetic
base_model: org/base-7b
slices:
  - sources: [{model: org/run-a, layer_range: [2, 4], parameters: {weight: 0.5}}]
"""
    models = zoo[1]
    close(opened(text).read(Q.format(0)), (models["org/base-7b"][Q.format(2)] + models["org/run-a"][Q.format(2)]) / 2)


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stacks_are_found_by_their_numbers():
    names = ["shared.weight", *(f"encoder.block.{i}.layer.{j}.w" for i in range(3) for j in range(2))]
    names += [f"decoder.block.{i}.layer.{j}.w" for i in range(3) for j in range(3)] + ["decoder.final_layer_norm.weight"]
    assert {p: s.count for p, s in main_stacks(names).items()} == {"encoder.block": 3, "decoder.block": 3}
    sees = [f"vision_tower.layers.{i}.w" for i in range(5)] + [f"model.layers.{i}.w" for i in range(3)]
    assert list(main_stacks(sees)) == ["model.layers"]
    assert list(main_stacks(sees[:5])) == ["vision_tower.layers"]
    moe = ["model.embed_tokens.weight", "model.norm.weight", "mlp1.0.weight", "mlp1.2.weight"]
    moe += [f"model.layers.{i}.mlp.experts.{j}.w1.weight" for i in range(2) for j in range(8)]
    assert list(stacks_of(moe)) == ["model.layers"]
    found = depths([*moe, "lm_head.weight", "embed_out.weight"])
    assert (found["model.embed_tokens.weight"], found["model.norm.weight"], found["embed_out.weight"]) == (0, 1, 1)
    assert found["model.layers.1.mlp.experts.0.w1.weight"] == 1
    assert stacks_of(["transformer.h.0.attn.bias", "transformer.h.1.attn.bias", "wte.weight"])["transformer.h"].count == 2


def test_configs_get_the_number_of_layers():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "eos_token_id": [1, 2, 3, 4],
        "vision_config": {"num_hidden_layers": 4, "depth": 4},
    }
    changed, lost = relayered(config, {"model.layers": Origin(4, (0, 1, 1, 2, 3))})
    assert changed == config | {"num_hidden_layers": 5, "layer_types": ["a", "b", "b", "c", "d"]}
    assert lost == []
    inner, _ = relayered({"text_config": {"n_layer": 4}}, {"model.layers": Origin(4, (0,))})
    assert inner == {"text_config": {"n_layer": 1}}
    t5 = {"num_layers": 3, "num_decoder_layers": 3}
    assert relayered(t5, {"decoder.block": Origin(3, (0, 2))})[0] == {"num_layers": 3, "num_decoder_layers": 2}
    assert relayered(t5, {"encoder.block": Origin(3, (0, 2))})[0] == {"num_layers": 2, "num_decoder_layers": 3}
    assert relayered({"hidden": 1}, {"h": Origin(2, (0,))})[1] == ["h"]
    assert relayered(config, {"model.layers": Origin(4, (0, 1, 2, 3))}) == (config, [])


def test_modules_go_by_name_then_by_kind():
    names = ["vision_tower.blocks.0.w", "multi_modal_projector.linear_1.w", "language_model.model.layers.0.w", "lm_head.weight"]
    found = assigned(names, ["text_decoder", "vision_tower", "multi_modal_projector"])
    assert list(found.values()) == ["vision_tower", "multi_modal_projector", "text_decoder", "text_decoder"]
    assert assigned(["encoder.a.w", "decoder.a.w", "shared.w"], ["encoder", "decoder"]) == {
        "encoder.a.w": "encoder",
        "decoder.a.w": "decoder",
    }


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────

HERE = "merge_method: ties\nbase_model: org/base-7b\nmodels:\n  - model: org/run-a\n    parameters: {weight: 1}\n"
CUT = "merge_method: passthrough\nslices:\n  - sources:\n      - model: org/run-a\n        layer_range: "


@pytest.mark.parametrize(
    ("text", "kind", "line", "says"),
    [
        ("merge_method: tyes\nmodels: [{model: a}]", UnknownNameError, 1, "Did you mean 'ties'?"),
        ("models: [{model: a}]\nmerge_methd: ties", RecipeError, 2, "Did you mean 'merge_method'?"),
        (HERE + "dtyp: float32", RecipeError, 6, "Did you mean 'dtype'?"),
        (HERE + "dtype: float23", RecipeError, 6, "Did you mean 'float32'?"),
        (HERE + "dtype: int64", RecipeError, 6, "int64"),
        (HERE + "slices: []", RecipeError, 6, "`models`, `slices` and `modules`"),
        ("merge_method: linear", RecipeError, 1, "`models`, `slices` and `modules`"),
        ("merge_method: linear\nmodels: []", RecipeError, 2, "at least one"),
        ("merge_method: linear\nmodels: x", RecipeError, 2, "must be a list"),
        ("merge_method: linear\nmodels:\n  - modle: a", RecipeError, 3, "Did you mean 'model'?"),
        ("merge_method: linear\nmodels:\n  - parameters: {weight: 1}", RecipeError, 3, "lacks 'model'"),
        ("merge_method: ties\nmodels: [{model: a}]", RecipeError, 1, "`base_model`"),
        (HERE.replace("weight", "wieght"), RecipeError, 5, "Did you mean 'weight'?"),
        (HERE + "parameters:\n  normalise: true", RecipeError, 7, "Did you mean 'normalize'?"),
        (HERE + "parameters:\n  normalize: 3", RecipeError, 7, "true or false"),
        (HERE + "parameters:\n  density: true", RecipeError, 7, "a number"),
        (HERE.replace("weight: 1", "weight: .nan"), RecipeError, 5, "finite"),
        (HERE + "parameters:\n  density: []", RecipeError, 7, "at least one"),
        (HERE + "parameters:\n  density:\n    - 1\n    - x", RecipeError, 9, "numbers"),
        (HERE + "parameters:\n  density:\n    - {value: 1}\n    - 2", RecipeError, 9, "{value: …}"),
        (HERE + "parameters:\n  density:\n    - {value: 1, fliter: x}", RecipeError, 8, "Did you mean 'filter'?"),
        (HERE + "parameters:\n  density:\n    - {filter: x}", RecipeError, 8, "lacks 'value'"),
        (HERE + "parameters: 3", RecipeError, 6, "mapping"),
        (HERE.replace("weight: 1", "weight: 1, lambda: 2"), RecipeError, 5, "not a parameter of one model"),
        (
            "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a}]\nparameters: {density: 1}",
            RecipeError,
            4,
            "density",
        ),
        (HERE + "tokenizer_source: base\ntokenizer: {source: base}", RecipeError, 7, "not both"),
        (HERE + "tokenizer: {sorce: base}", RecipeError, 6, "Did you mean 'source'?"),
        (HERE + "tokenizer:\n  tokens:\n    x: {source: org/run-b}", RecipeError, 8, "Did you mean 'org/run-a'?"),
        (HERE + "tokenizer:\n  tokens:\n    x: {source: {kind: zeros}}", RecipeError, 8, "Did you mean 'zero'?"),
        (HERE + "tokenizer:\n  tokens:\n    x: {source: {kind: model_token, model: org/run-a}}", RecipeError, 8, "`token_id`"),
        (HERE + "tokenizer: {pad_to_multiple_of: 0}", RecipeError, 6, "whole number"),
        ("merge_method: linear\ntokenizer_source: base\nmodels: [{model: a}]", RecipeError, 2, "`base_model`"),
        (HERE + "chat_template: chatlm", RecipeError, 6, "Did you mean 'chatml'?"),
        (CUT + "[0, 1, 2]", RecipeError, 5, "[first, end]"),
        (CUT + "[2, 2]", RecipeError, 5, "no layer"),
        (CUT + "[-1, 2]", RecipeError, 5, "whole number"),
        (CUT + "[0, 2]\n      - {model: b, layer_range: [0, 3]}", RecipeError, 3, "as many layers"),
        ("merge_method: linear\nmodules: {}", RecipeError, 2, "modules"),
        ("merge_method: linear\nmodules:\n  text: {}", RecipeError, 3, "`models` or `slices`"),
        ("name: x\n" + HERE + "---\nname: x\n" + HERE, RecipeError, 8, "two documents"),
        (HERE + "---\n" + HERE, RecipeError, 7, "no `name`"),
        ("merge_method: [ties", RecipeError, 1, "not YAML"),
        ("merge_method: ties\nmerge_method: ties", RecipeError, 2, "duplicate key"),
        (HERE + "---\n- x", RecipeError, 1, "mapping"),
        ("", RecipeError, 1, "mapping"),
        ("merge_method: ties\nbase_model: {path: x}\nmodels: [{model: a}]", RecipeError, 2, "unknown key 'path'"),
        ("merge_method: 3\nmodels: [{model: a}]", RecipeError, 1, "string"),
    ],
)
def test_errors_without_models(text, kind, line, says):
    with pytest.raises(kind) as caught:
        parse_mergekit(text, "mk.yaml")
    assert str(caught.value).startswith(f"mk.yaml:{line}: "), caught.value
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "line", "says"),
    [
        (HERE.replace("run-a", "nowhere/at-all"), CheckpointError, 4, "no such"),
        (HERE.replace("run-a", "run-a@main"), RecipeError, 4, "no revision"),
        (HERE.replace("run-a", "run-a+./no-lora"), CheckpointError, 4, "no such"),
        (HERE + "parameters:\n  density: {filter: mpl, value: 0.5}", RecipeError, 7, "'mpl'"),
        (HERE.replace("weight: 1", "weight: {filter: mlp, value: 1}"), RecipeError, 4, "needs `weight` of org/run-a"),
        (HERE + "parameters:\n  density: 1.5", ParameterError, 7, "'density'"),
        (HERE.replace("ties", "dare_ties") + "parameters:\n  normalize: true\n  density: 0", ParameterError, 8, "density = 0"),
        (HERE.replace("ties", "della") + "parameters:\n  epsilon: 0.4\n  density: 0.3", ParameterError, 8, "epsilon"),
        (HERE.replace("org/run-a", "org/base-7b"), RecipeError, 3, "no models besides"),
        (HERE.replace("ties", "model_stock").replace("    parameters: {weight: 1}\n", ""), LayoutError, 3, "at least 2"),
        ("merge_method: slerp\nmodels: [{model: org/run-a}]\nparameters: {t: 1}", LayoutError, 2, "exactly 2"),
        ("merge_method: slerp\nmodels: [{model: org/run-a}, {model: org/run-b}]", RecipeError, 2, "needs `t`"),
        (family("linear", "{}").replace("0.8", "-0.4"), ParameterError, 4, "sum to zero"),
        (family("task_arithmetic", "{normalize: true}").replace("0.8", "-0.4"), ParameterError, 4, "sum to zero"),
        (family("nuslerp", "{}", k=3), ParameterError, 1, "exactly 2"),
        (CUT + "[2, 5]", LayoutError, 4, "0 to 3"),
        ("merge_method: linear\nmodules:\n  vision_tower: {models: [{model: org/run-a}]}", RecipeError, 3, "'vision_tower'"),
        (STREAM.replace("model: org/run-b", "model: trimmed"), RecipeError, 5, "a circle"),
        (HERE.replace("org/run-a", "odd"), LayoutError, 3, "does not fit"),
        (HERE + "parameters: {normalize: [{filter: mlp, value: true}, {value: false}], density: 0.5}", None, 0, ""),
        (
            "merge_method: model_stock\nbase_model: org/base-7b\nmodels: [{model: org/run-a}, {model: org/run-b}]\n"
            "parameters: {filter_wise: [{filter: mlp, value: true}, {value: false}]}",
            RecipeError,
            3,
            "for all tensors",
        ),
    ],
)
def test_errors_before_a_tensor_is_read(opened, zoo, text, kind, line, says, monkeypatch):
    root, models = zoo
    if not (root / "odd").exists():
        write_model(root / "odd", models["org/run-a"] | {HEAD: torch.zeros(33, 16)})

    def forbidden(*_):
        raise AssertionError("a tensor was read")

    for name in ("safetensors.SafetensorsFile", "safetensors.Sharded", "lora.Lora"):
        monkeypatch.setattr(f"eutectic.checkpoint.{name}._read", forbidden)
    if kind is None:
        opened(text)
        return
    with pytest.raises(kind) as caught:
        opened(text)
    assert str(caught.value).startswith(f"mk.yaml:{line}: "), caught.value
    assert says in str(caught.value)


def test_compat_only_warns(opened):
    text = HERE.replace("weight: 1", "weight: 1, lambda: 2") + "dtyp: float32\nslices: []\nparameters: {density: 0.5, foo: 1}"
    composed = opened(text, compat=True)
    assert [re.match(r"mk\.yaml:(\d+): (.*)", note)[2].split(".")[0] for note in composed.notes] == [
        "unknown key 'dtyp' in the recipe",
        "`lambda` is not a parameter of one model; move it to the slice's or the recipe's (ignored)",
        "`foo` means nothing to ties",
    ]


# ── files, hashes and the command line ────────────────────────────────────────────────────────────────────────────────


def test_the_schema_is_recognised(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(SOUP)
    assert load(path).methods == ("linear",)
    path.write_text("method: average\nexperts: [a]")
    assert isinstance(load(path), Recipe)
    with pytest.raises(RecipeError, match="merge_method"):
        load(path, compat=True)
    path.write_text(MOE)
    assert load(path).methods == ("moe",)


def test_hashes():
    wanted = parse_mergekit(SOUP).sha256()
    keys = SOUP.replace("dtype: float32\n", "").replace("models:", "dtype: float32\nmodels:")
    assert parse_mergekit("# said otherwise\n" + keys).sha256() == wanted
    assert parse_mergekit(parse_mergekit(SOUP).to_yaml()).sha256() == wanted
    for other in (SOUP.replace("0.4", "0.5"), SOUP.replace("chat", "chit")):
        assert parse_mergekit(other).sha256() != wanted
    assert parse_mergekit(SOUP, compat=True).sha256() != wanted


def test_the_command_line(run, zoo, tmp_path):
    root, _ = zoo
    path = root / "mk.yaml"
    path.write_text(SLERP)
    status, out, err = run("plan", path)
    assert status == 0, err
    assert re.search(r"^method +slerp", out, re.MULTILINE)
    assert re.search(r"^experts +org/chat-7b, org/math-7b$", out, re.MULTILINE)
    status, out, err = run("merge", path, tmp_path / "out")
    assert (status, out) == (0, f"{tmp_path / 'out'}: slerp of 2 expert(s)\n"), err
    assert eu.open(tmp_path / "out").specs[HEAD].dtype == torch.bfloat16
    path.write_text(SLERP + "dtyp: float16")
    assert run("merge", path, tmp_path / "no")[0] == 2
    status, _, err = run("merge", path, tmp_path / "yes", "--compat", "mergekit")
    assert status == 0, err
    assert "note: " in err
    assert "'dtyp'" in err


def test_a_result_is_a_checkpoint_like_any(opened, zoo):
    composed = opened(SOUP)
    assert isinstance(composed, Composed)
    assert isinstance(composed, eu.Checkpoint)
    half = composed.read(HEAD, slice(3, 9))
    assert torch.equal(half, composed.read(HEAD)[3:9])
    doubled = eu.merge("average", None, [composed, opened(UPSCALE.replace("[1, 4]", "[3, 4]"))])
    assert torch.isfinite(doubled.read(HEAD)).all()
    with pytest.raises(EutecticError):
        composed.read("nothing")
    assert math.prod(composed.spec(HEAD).shape) == 32 * 16
