"""Mixtures of experts: what transformers computes with them, gates against naive ones, configs, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eutectic as eu
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_path
from eutectic.checkpoint.save import save_tensors
from eutectic.errors import CheckpointError, LayoutError, MissingDependencyError, NonFiniteError, RecipeError
from eutectic.merge import router_inputs
from eutectic.merge.gates import MODES, Gates, Prompts, Rows, condition, direction, drawn, gaussian
from eutectic.merge.mergekit import parse_mergekit
from eutectic.merge.plan import plan
from eutectic.merge.recipe import load
from eutectic.merge.run import save, verify
from eutectic.merge.upcycle import FAMILIES, Expert, Upcycled, gate_rows, require_dense, require_expert
from eutectic.merge.upcycle_config import family_for, mixture_config

WORDS = ["<unk>", "<s>", "</s>", *["solve", "the", "equation", "write", "a", "poem", "python", "function", "now"]]
HIDDEN, LAYERS, VOCABULARY = 32, 2, len(WORDS)
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
}
IDS = torch.tensor([[1, 3, 4, 5, 6, 7, 8, 9], [1, 9, 8, 7, 3, 3, 4, 10]])
GATE = {"mixtral": "block_sparse_moe", "qwen_moe": "mlp", "qwen3_moe": "mlp"}


def dense(kind, seed=0, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS[kind], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that norms and biases have something to say
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model.eval()


def write_tokenizer(folder):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # transformers has a class of its own for Qwen2's tokenizers, which finds whole words only where they are added tokens
    made.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in WORDS[3:]])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_dense(folder, model, tokenizer=True):
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Folders ``KIND/base``, ``KIND/a`` and ``KIND/b``, and the models in them; ``qwen2/wide`` has wider MLPs."""
    root, models = tmp_path_factory.mktemp("zoo"), {}
    for kind in KINDS:
        for seed, name in enumerate(("base", "a", "b")):
            models[f"{kind}/{name}"] = dense(kind, seed)
            write_dense(root / kind / name, models[f"{kind}/{name}"], tokenizer=name == "base")
    models["qwen2/wide"] = dense("qwen2", 3, intermediate_size=56)
    write_dense(root / "qwen2/wide", models["qwen2/wide"], tokenizer=False)
    return root, models


@pytest.fixture
def made(zoo, tmp_path):
    """A function that writes a recipe's output and loads it with transformers."""
    from transformers import AutoModelForCausalLM

    def make(text, compat=False):
        recipe = parse_mergekit(text, "moe.yaml", compat)
        with recipe.open(zoo[0]) as composed:
            out = save(composed, tmp_path / f"out-{len(list(tmp_path.iterdir()))}", recipe=recipe)
        return AutoModelForCausalLM.from_pretrained(out).eval(), out

    return make


@pytest.fixture
def opened(zoo):
    """A function that opens a recipe beside the models."""
    held = []

    def open_recipe(text, compat=False):
        held.append(parse_mergekit(text, "moe.yaml", compat).open(zoo[0]))
        return held[-1]

    yield open_recipe
    for composed in held:
        composed.close()


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


RECIPE = """
base_model: {kind}/base
gate_mode: {mode}
experts_per_token: {k}
experts:
  - {{source_model: {kind}/base}}
  - {{source_model: {kind}/base}}
  - {{source_model: {kind}/base}}
"""
SHARED = "shared_experts: [{source_model: qwen2/base, residual_scale: 1.0}]\n"
PROMPTED = """
base_model: llama/base
gate_mode: {mode}
experts:
  - source_model: llama/a
    positive_prompts: ["solve the equation", "equation"]
    negative_prompts: ["write a poem"]
  - source_model: llama/b
    positive_prompts: ["write a python function now"]
"""


# ── laws: what transformers computes ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize(("mode", "k"), [("random", 2), ("uniform_random", 1), ("uniform_random", 3)])
def test_experts_equal_to_the_base_make_the_base(made, zoo, kind, mode, k):
    model, out = made(RECIPE.format(kind=kind, mode=mode, k=k))
    close(logits(model), logits(zoo[1][f"{kind}/base"]))
    assert verify(out) == []


@pytest.mark.parametrize("k", [1, 2])
def test_half_of_qwens_routed_experts_and_half_of_a_shared_one_make_the_base(made, zoo, k):
    text = RECIPE.format(kind="qwen2", mode="random", k=k).replace("qwen2/base}", "qwen2/base, residual_scale: 0.5}")
    model, _ = made(text + SHARED)
    close(logits(model), logits(zoo[1]["qwen2/base"]))


def test_qwens_sum_is_said_when_it_is_not_the_bases(opened):
    text = RECIPE.format(kind="qwen2", mode="random", k=2)
    assert any("1.5 times" in note and "moe.yaml:9" in note for note in opened(text + SHARED).notes)
    half = text.replace("qwen2/base}", "qwen2/base, residual_scale: 0.5}")
    assert opened(half + SHARED).notes == ()
    gated = (text + SHARED).replace("random", "cheap_embed").replace("qwen2/base", "qwen2/base, positive_prompts: [a poem]")
    assert opened(gated.replace("base, positive_prompts: [a poem]", "base", 1)).notes == ()  # by how much depends on the token


@pytest.mark.parametrize(("kind", "shared"), [("llama", ""), ("mistral", ""), ("qwen3", ""), ("qwen2", "wide")])
@pytest.mark.parametrize("winner", [0, 1])
def test_the_expert_that_wins_is_the_one_that_is_run(zoo, tmp_path, kind, shared, winner):
    """With one expert a token and a gate that always picks j, logits are those of a model with the MLPs of expert j."""
    from transformers import AutoModelForCausalLM

    root, models = zoo
    base = open_path(root / kind / "base")
    config = json.loads((root / kind / "base/config.json").read_text())
    family = family_for(config, base)
    layers = require_dense(family, base)
    experts = [require_expert(base, Expert(n, open_path(root / kind / n)), any_float=False) for n in "ab"]
    beside = Expert(shared, open_path(root / kind / shared), scale=0.0) if shared else None
    wanted = dense(kind)
    wanted.load_state_dict(models[f"{kind}/base"].state_dict())
    for layer, other in zip(wanted.model.layers, models[f"{kind}/{'ab'[winner]}"].model.layers, strict=True):
        layer.mlp.load_state_dict(other.mlp.state_dict())
    seen = []
    for layer in wanted.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    expected = logits(wanted)
    # fewer tokens than dimensions: there is a row g with g · x = 5 for all that the router sees; the loser's is 0
    rows = torch.zeros(layers, 3, HIDDEN)
    for layer, x in enumerate(x.reshape(-1, HIDDEN).double() for x in seen):
        rows[layer, winner] = torch.linalg.pinv(x) @ torch.full((len(x),), 5.0).double()
    mixture = Upcycled(family, base, experts, beside, Gates(gate_rows(family, layers, 2), HIDDEN, lambda: rows))
    out = tmp_path / "out"
    out.mkdir()
    save_tensors(mixture, out)
    about = mixture_config(family, config, experts=2, active=1, width=experts[0].width, shared=beside)
    (out / "config.json").write_text(json.dumps(about))
    close(logits(AutoModelForCausalLM.from_pretrained(out).eval()), expected, 1e-3)


def test_tokens_go_to_the_expert_whose_gate_they_are_nearest_to(made, zoo):
    """The router's choice inside transformers is argmax gate · x, and the block's output is that expert's MLP of x."""
    model, out = made(PROMPTED.format(mode="hidden") + "experts_per_token: 1\n")
    models = zoo[1]
    seen = {}
    block = model.model.layers[1].mlp
    block.register_forward_hook(lambda module, inputs, out: seen.update(x=inputs[0], y=out))
    logits(model)
    x, y = seen["x"].reshape(-1, HIDDEN), seen["y"].reshape(-1, HIDDEN)
    gate = open_path(out).read("model.layers.1.block_sparse_moe.gate.weight")
    best = (x @ gate.T).argmax(1)
    assert set(best.tolist()) == {0, 1}
    with torch.inference_mode():
        both = torch.stack([models[f"llama/{name}"].model.layers[1].mlp(x) for name in "ab"])
    close(y, both[best, torch.arange(len(x))])


def test_a_shared_expert_may_be_wider_and_is_added_by_half(made, zoo):
    text = RECIPE.format(kind="qwen2", mode="random", k=2) + SHARED.replace("/base", "/wide").replace("1.0", "0.5")
    model, out = made(text)
    seen = {}
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: seen.update(x=inputs[0], y=out))
    logits(model)
    with torch.inference_mode():
        base, wide = (zoo[1][f"qwen2/{name}"].model.layers[0].mlp(seen["x"]) for name in ("base", "wide"))
    close(seen["y"], base + 0.25 * wide)
    assert json.loads((out / "config.json").read_text())["shared_expert_intermediate_size"] == 56


# ── gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def naive_vectors(model, text, mode, entering):
    """Of each layer, by a plain forward pass of the model in memory."""
    ids = [WORDS.index(word) for word in text.split()]
    if mode == "cheap_embed":
        total = model.get_input_embeddings().weight[ids].double().sum(0)
        return (total / total.norm()).expand(LAYERS, HIDDEN)
    seen = []
    for layer in model.model.layers:
        if entering:
            layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        else:
            layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    model(torch.tensor([[1, *ids]]))
    return torch.stack([x[0].double().mean(0) if mode == "hidden_avg" else x[0, -1].double() for x in seen])


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
@pytest.mark.parametrize("compat", [False, True])
def test_prompted_gates_against_a_plain_forward_pass(opened, zoo, mode, compat):
    composed = opened(PROMPTED.format(mode=mode), compat)

    def vectors(*texts):
        with torch.no_grad():
            return torch.stack([naive_vectors(dense("llama"), text, mode, compat) for text in texts]).mean(0)

    rows = [
        vectors("solve the equation", "equation") - vectors("write a poem"),
        vectors("write a python function now"),
    ]
    for layer in range(LAYERS):
        gate = composed.read(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        wanted = torch.stack([row[layer] / row[layer].norm() for row in rows])
        close(gate.double(), wanted, 1e-5)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_gates_of_the_other_kinds_of_model(opened, kind, batch, monkeypatch):
    monkeypatch.setattr(router_inputs, "BATCH", batch)
    texts = ["solve the equation now", "a poem", "write a python function now"]
    text = f"base_model: {kind}/base\nexperts_per_token: 1\nexperts:\n"
    text += "".join(
        f"  - {{source_model: {kind}/a, positive_prompts: [{said}]}}\n" for said in texts[: 2 if "2" in kind else 3]
    )
    text += f"shared_experts: [{{source_model: qwen2/a, positive_prompts: [{texts[2]}]}}]\n" if kind == "qwen2" else ""
    composed = opened(text)
    with torch.no_grad():
        vectors = torch.stack([naive_vectors(dense(kind), said, "hidden", False) for said in texts], dim=1)
    wanted = vectors / vectors.norm(dim=-1, keepdim=True)
    for layer in range(LAYERS):
        names = [name for name in composed.specs if f".{layer}." in name and name.endswith("gate.weight")]
        close(torch.cat([composed.read(name) for name in names]).double(), wanted[layer], 1e-5)


def test_padding_is_in_no_vector(opened):
    """A prompt's vector does not depend on the prompts that it is run beside."""
    alone = PROMPTED.format(mode="hidden_avg")
    beside = alone.replace("write a python function now", "write a python function now write a python function now")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    close(opened(alone).read(name)[0], opened(beside).read(name)[0], 1e-5)


def test_random_gates():
    name = "model.layers.0.block_sparse_moe.gate.weight"
    normal, uniform = drawn("random", name, 8, 4096), drawn("uniform_random", name, 8, 4096)
    assert abs(float(normal.mean())) < 0.02
    assert abs(float(normal.std()) - 1) < 0.02
    assert float(uniform.abs().max()) <= 1 / 64
    assert abs(float(uniform.std()) * 64 - 3**-0.5) < 0.01
    assert torch.equal(normal, drawn("random", name, 8, 4096))
    assert not torch.equal(normal, drawn("random", name.replace("0", "1"), 8, 4096))


@given(st.integers(0, 200), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_a_part_of_a_gaussian_stream_is_part_of_the_whole(start, n):
    assert torch.equal(gaussian(("k",), start, n), gaussian(("k",), 0, start + n)[start:])


def test_directions():
    vectors = {"a": torch.tensor([[3.0, 0], [0, 2]]), "b": torch.tensor([[0, 4.0], [0, 1]])}
    close(direction(Prompts(("a",), ("b",)), vectors), torch.tensor([[0.6, -0.8], [0, 1]], dtype=torch.float64))
    with pytest.raises(RecipeError, match="cancel out"):
        direction(Prompts(("a",), ("a",)), vectors)
    with pytest.raises(NonFiniteError):
        direction(Prompts(("a",)), {"a": torch.full((1, 2), torch.nan)})
    assert condition(torch.eye(3)) == pytest.approx(1)


def test_gates_are_made_once():
    calls = []
    gates = Gates({"g": Rows(0, 0, 2), "s": Rows(0, 2, 3)}, 4, lambda: calls.append(1) or torch.arange(12.0).view(1, 3, 4))
    assert gates.read("s").tolist() == [[8, 9, 10, 11]]
    assert gates.read("g", slice(1, 2)).tolist() == [[4, 5, 6, 7]]
    assert calls == [1]


def test_a_copy_for_another_machine_reads_the_same_and_runs_no_prompt(opened, monkeypatch):
    composed = opened(PROMPTED.format(mode="hidden"))
    copy = pickle.loads(pickle.dumps(composed))
    monkeypatch.setattr(router_inputs, "prompt_vectors", None)
    with copy:
        assert all(torch.equal(copy.read(name), composed.read(name)) for name in composed.specs)


def test_a_degenerate_gate_is_noted(opened):
    text = PROMPTED.format(mode="hidden").replace('    negative_prompts: ["write a poem"]\n', "")
    text = text.replace('"solve the equation", "equation"', '"write a python function now"')
    composed = opened(text)
    assert composed.mixture.found == []
    composed.read("model.layers.0.block_sparse_moe.gate.weight")
    assert len(composed.mixture.found) == 1
    assert "moe.yaml:4: the gates of 2 of 2 layers" in composed.mixture.found[0]


# ── weights, noise, scale, dtypes ─────────────────────────────────────────────────────────────────────────────────────


def test_noise_and_scale(opened, zoo):
    text = RECIPE.format(kind="llama", mode="random", k=2).replace("base}", "base, noise_scale: 0.5, residual_scale: -2}", 1)
    mixed, model = opened(text), zoo[1]["llama/base"].state_dict()
    for part, name, scale in (("gate_proj", "w1", 1), ("up_proj", "w3", 1), ("down_proj", "w2", -2)):
        old = model[f"model.layers.0.mlp.{part}.weight"]
        noisy, plain = (mixed.read(f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight") for e in (0, 1))
        noise = noisy / scale - old
        assert abs(float(noise.mean())) < 0.1
        assert abs(float(noise.std()) - 0.5) < 0.05
        assert torch.equal(plain, old)
    noises = []
    for layer in (0, 1):
        found = mixed.read(f"model.layers.{layer}.block_sparse_moe.experts.0.w1.weight")
        noises.append(found - model[f"model.layers.{layer}.mlp.gate_proj.weight"])
    assert not torch.allclose(*noises)


@pytest.mark.parametrize("cut", [1, 7, 640])
def test_any_chunking_is_the_whole(opened, cut):
    text = RECIPE.format(kind="llama", mode="random", k=2).replace("base}", "base, noise_scale: 0.5}")
    composed = opened(text)
    for name in ("model.layers.0.block_sparse_moe.experts.2.w2.weight", "model.layers.0.block_sparse_moe.gate.weight"):
        n = min(composed.spec(name).numel, 700)
        parts = [composed.read_flat(name, at, min(at + cut, n)) for at in range(0, n, cut)]
        assert torch.equal(torch.cat(parts), composed.read(name).reshape(-1)[:n])


def test_dtype_is_cast_and_said(made):
    _, out = made(RECIPE.format(kind="llama", mode="random", k=2) + "dtype: bfloat16\n")
    assert {spec.dtype for spec in open_path(out).specs.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_expert_that_overflows_or_is_broken_is_named(zoo, opened, tmp_path):
    text = RECIPE.format(kind="llama", mode="random", k=2).replace("base}", "base, residual_scale: 1e9}") + "dtype: float16"
    with pytest.raises(NonFiniteError, match=r"experts\.0\.w2\.weight' overflows torch\.float16"):
        opened(text).read("model.layers.0.block_sparse_moe.experts.0.w2.weight")
    weights = {name: tensor.clone() for name, tensor in zoo[1]["llama/a"].state_dict().items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    (tmp_path / "nan").mkdir()
    save_tensors(Memory(weights), tmp_path / "nan")
    text = RECIPE.format(kind="llama", mode="random", k=2).replace("llama/base}", f"'{tmp_path / 'nan'}'}}", 1)
    with pytest.raises(NonFiniteError, match=r"nan.*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        eu.state_dict(opened(text))


# ── configs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def config_for(kind, **config):
    family = next(family for family in FAMILIES if kind in family.dense)
    given = {"model_type": kind, "num_attention_heads": 4, "num_hidden_layers": 4, **config}
    return mixture_config(family, given, experts=3, active=2, width=40, shared=None)


def test_what_a_config_takes_for_granted_is_written_out():
    llama = config_for("llama")
    assert (llama["rope_theta"], llama["rms_norm_eps"], llama["num_key_value_heads"]) == (1e4, 1e-6, 4)
    assert llama["sliding_window"] is None
    assert config_for("llama", rope_parameters={"rope_type": "default"})["rope_parameters"]["rope_theta"] == 1e4
    assert config_for("llama", rope_parameters={"rope_theta": 5e5})["rope_theta"] == 5e5
    assert config_for("mistral")["sliding_window"] == 4096
    assert config_for("mistral", sliding_window=None)["sliding_window"] is None
    assert config_for("qwen3")["head_dim"] == 128
    qwen = config_for("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert qwen["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"]
    assert qwen["norm_topk_prob"] is True
    with pytest.raises(LayoutError, match="window of 8 tokens"):
        config_for("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert config_for("qwen3", use_sliding_window=True, sliding_window=8)["use_sliding_window"] is False


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_bare_config_means_what_the_dense_model_meant(zoo, kind, tmp_path):
    """Every key that a config may leave out is left out; transformers must then make the same attention of both."""
    from transformers import AutoConfig

    bare = {"model_type": kind, **{key: COMMON[key] for key in COMMON if key not in ("num_key_value_heads",)}}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    old = AutoConfig.from_pretrained(tmp_path)
    mixed = mixture_config(
        next(family for family in FAMILIES if kind in family.dense), bare, experts=3, active=2, width=40, shared=None
    )
    (tmp_path / "config.json").write_text(json.dumps(mixed))
    new = AutoConfig.from_pretrained(tmp_path)
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_act"):
        assert getattr(new, key) == getattr(old, key), key
    head_dim = getattr(old, "head_dim", None) or 8
    assert (getattr(new, "head_dim", None) or 8) == head_dim
    assert (new.sliding_window or None) == (getattr(old, "sliding_window", None) or None)
    assert new.tie_word_embeddings == old.tie_word_embeddings


# ── the recipe as a user has it ───────────────────────────────────────────────────────────────────────────────────────


def test_shape_seven_on_the_command_line(zoo, tmp_path, run, monkeypatch):
    monkeypatch.chdir(zoo[0])
    recipe = zoo[0] / "moe.yaml"
    recipe.write_text(PROMPTED.format(mode="hidden") + "dtype: bfloat16\n")
    out = tmp_path / "out"
    status, printed, _ = run("plan", recipe)
    assert status == 0
    assert "mixtral {'gate_mode': 'hidden', 'experts_per_token': 2}" in printed
    assert "experts         llama/a, llama/b" in printed
    status, printed, _ = run("merge", recipe, out)
    assert (status, printed) == (0, f"{out}: mixtral of 2 expert(s)\n")
    assert run("verify", out)[0] == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 2, 2)
    assert (out / "tokenizer.json").read_bytes() == (zoo[0] / "llama/base/tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "llama/base" in card
    assert "positive_prompts" in card
    about = json.loads((out / "eutectic.json").read_text())
    assert set(about["inputs"]) == {"llama/base", "llama/a", "llama/b"}
    assert all(found["blake3"] for found in about["inputs"].values())
    assert about["recipe"]["mergekit"][0]["gate_mode"] == "hidden"


def test_a_degenerate_gate_is_said_on_the_command_line(zoo, tmp_path, run, monkeypatch):
    recipe = zoo[0] / "same.yaml"
    prompts = "positive_prompts: [write a poem]"
    recipe.write_text(
        f"base_model: llama/base\ngate_mode: cheap_embed\nexperts:\n"
        f"  - {{source_model: llama/a, {prompts}}}\n  - {{source_model: llama/b, {prompts}}}\n"
    )
    status, _, said = run("merge", recipe, tmp_path / "out")
    assert status == 0
    assert f"note: {recipe}:3: the gates of 2 of 2 layers" in said


def test_a_merge_that_was_stopped_is_carried_on(zoo, tmp_path, opened):
    text = PROMPTED.format(mode="hidden").replace("llama/b\n", "llama/b\n    noise_scale: 0.1\n")
    recipe = parse_mergekit(text)

    def stop(what, done, total):
        if what == "merging" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(opened(text), tmp_path / "out", recipe=recipe, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    save(opened(text), tmp_path / "out", recipe=recipe)
    save(opened(text), tmp_path / "again", recipe=recipe)
    assert eu.diff(tmp_path / "out", tmp_path / "again") == []
    assert verify(tmp_path / "out") == []


def test_names_are_the_hubs(opened):
    names = set(opened(RECIPE.format(kind="mistral", mode="random", k=2)).specs)
    assert {f"model.layers.1.block_sparse_moe.experts.2.w{i}.weight" for i in (1, 2, 3)} <= names
    assert not any(".mlp." in name for name in names)
    qwen = opened(RECIPE.format(kind="qwen2", mode="random", k=2) + SHARED).specs
    assert qwen["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, HIDDEN)
    assert qwen["model.layers.0.mlp.gate.weight"].shape == (3, HIDDEN)
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in qwen


def test_opening_and_planning_read_no_tensor(zoo, opened, monkeypatch):
    from eutectic.checkpoint.safetensors import SafetensorsFile

    monkeypatch.setattr(SafetensorsFile, "_read", lambda *_: pytest.fail("a tensor is read"))
    planned = plan(opened(PROMPTED.format(mode="hidden")))
    assert planned.passes == 2
    assert planned.tensors == 3 + LAYERS * (2 + 4 + 1 + 2 * 3)


def test_hashes_and_documents():
    recipe = parse_mergekit(PROMPTED.format(mode="hidden"))
    assert parse_mergekit(recipe.to_yaml()).sha256() == recipe.sha256()
    assert (recipe.methods, recipe.base_models) == (("moe",), ("llama/base",))


def test_adapters_are_experts_too(zoo, opened, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    torch.manual_seed(0)
    module = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = torch.randn(2, HIDDEN), torch.randn(40, 2)
    save_tensors(Memory({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}), adapter)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"], "base_model_name_or_path": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    text = RECIPE.format(kind="llama", mode="random", k=2).replace("llama/base}", f"'llama/a+{adapter}'}}", 1)
    found = opened(text).read("model.layers.0.block_sparse_moe.experts.0.w3.weight")
    close(found, zoo[1]["llama/a"].state_dict()["model.layers.0.mlp.up_proj.weight"] + b @ a)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = """base_model: llama/base
gate_mode: random
experts_per_token: 1
experts:
  - source_model: llama/a
  - source_model: llama/b
"""


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (("random", "hiden"), RecipeError, "moe.yaml:2: `gate_mode` is 'hiden'. Did you mean 'hidden'?"),
        (("token: 1", "token: 3"), RecipeError, "moe.yaml:3: `experts_per_token` is 3, and there are 2 experts"),
        (("token: 1", "token: 0"), RecipeError, "moe.yaml:3: .*from 1 on"),
        (("random", "hidden"), RecipeError, "moe.yaml:5: `gate_mode: hidden` needs `positive_prompts`"),
        (("random", "cheap_embed"), RecipeError, "moe.yaml:5: `gate_mode: cheap_embed` needs `positive_prompts`"),
        (("gate_mode", "gatemode"), RecipeError, "moe.yaml:2: unknown key 'gatemode'.* Did you mean 'gate_mode'?"),
        (("llama/b\n", "llama/b\n    noise_scale: -1\n"), RecipeError, "moe.yaml:7: `noise_scale`"),
        (
            ("llama/b\n", "llama/b\n    residual_scale: x\n"),
            RecipeError,
            "moe.yaml:7: `residual_scale` must be a finite number",
        ),
        (("llama/b\n", "llama/b\n    positive_prompts: hello\n"), RecipeError, "moe.yaml:7: `positive_prompts` must be a list"),
        (("source_model: llama/b", "sorce_model: llama/b"), RecipeError, "moe.yaml:6: .*Did you mean 'source_model'?"),
        (("llama/b\n", "llama/b\ndtype: bfloat\n"), RecipeError, "moe.yaml:7: `dtype` is 'bfloat'. Did you mean 'bfloat16'"),
        (("llama/b\n", "llama/b\narchitecture: mixtrall\n"), LayoutError, "moe.yaml:7: .*Did you mean 'mixtral'?"),
        (("llama/b\n", "llama/b\narchitecture: qwen\n"), LayoutError, "moe.yaml:7: .*'llama' model.*or say 'mixtral'"),
        (("llama/b\n", "llama/b\narchitecture: DeepSeek MoE\n"), LayoutError, "moe.yaml:7: .*never loaded"),
        (("llama/base", "qwen2/base"), RecipeError, "moe.yaml:4: a Qwen2-MoE needs exactly one shared expert"),
        (("llama/b\n", "llama/b\n" + SHARED), RecipeError, "moe.yaml:7: a Mixtral has no shared experts"),
        (("llama/b\n", "qwen2/wide\n"), LayoutError, "moe.yaml:6: expert 'qwen2/wide' .*does not fit the base"),
        (("llama/b\n", "./nowhere\n"), CheckpointError, "moe.yaml:6: "),
        (("llama/b\n", "llama/b\n---\nmerge_method: linear\n"), RecipeError, "moe.yaml:4: .*stands alone"),
    ],
)
def test_bad_recipes(opened, change, error, said):
    assert change[0] in PLAIN
    with pytest.raises(error, match=said.replace("?", r"\?").replace("(", r"\(")):
        opened(PLAIN.replace(*change))


def test_unknown_keys_are_notes_under_compat(opened):
    assert any("gatemode" in note for note in opened(PLAIN + "gatemode: x\n", compat=True).notes)


def test_a_biased_model_is_no_mixtral(zoo, tmp_path):
    write_dense(tmp_path / "biased", dense("llama", attention_bias=True))
    (tmp_path / "moe.yaml").write_text(PLAIN.replace("llama/base", "biased"))  # its experts are not even looked for
    with pytest.raises(LayoutError, match=r"moe\.yaml:1: .*_proj\.bias' has no place in a Mixtral model"):
        load(tmp_path / "moe.yaml").open(tmp_path)


def test_other_kinds_of_model_are_refused(zoo, tmp_path):
    folder = write_dense(tmp_path / "gemma", dense("llama"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gemma"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match="no mixture is made of 'gemma' models"):
        parse_mergekit(PLAIN.replace("llama/base", "gemma")).open(tmp_path)


def test_other_dtypes_need_a_dtype(zoo, tmp_path, opened):
    write_dense(tmp_path / "half", dense("llama", 1).half(), tokenizer=False)
    text = PLAIN.replace("llama/a", str(tmp_path / "half"))
    with pytest.raises(LayoutError, match=r"moe\.yaml:5: .*[\s\S]*`dtype:`"):
        opened(text)
    assert opened(text + "dtype: float16\n").specs["model.norm.weight"].dtype == torch.float16


def test_prompts_that_cancel_out(opened):
    text = PROMPTED.format(mode="cheap_embed").replace('"solve the equation", "equation"', '"write a poem"')
    with pytest.raises(RecipeError, match=r"moe\.yaml:5: .*cancel out"):
        opened(text).read("model.layers.0.block_sparse_moe.gate.weight")


def test_gates_from_prompts_need_a_tokenizer(zoo, opened):
    with pytest.raises(RecipeError, match=r"moe\.yaml:2: .*needs a tokenizer"):
        opened(PROMPTED.format(mode="hidden").replace("llama/base", "llama/b"))


def test_without_transformers_nothing_is_left(zoo, tmp_path, opened, monkeypatch):
    composed = opened(PROMPTED.format(mode="hidden"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"eutectic\[text\]"):
        save(composed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_mode_is_read(opened):
    for mode in MODES:
        opened(PROMPTED.format(mode=mode))
