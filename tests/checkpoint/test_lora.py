"""LoRA adapters as views of their base: PEFT is the oracle."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import safetensors.torch
import torch

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_folder, open_path
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.save import save_tensors
from eutectic.errors import CheckpointError

PREFIX = "base_model.model."
A, B = "base_model.model.m.fc.lora_A.weight", "base_model.model.m.fc.lora_B.weight"
NONE = {A: None, B: None}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["fc"]}


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Memory({"m.fc.weight": torch.rand(5, 3), "m.fc.bias": torch.rand(5), "head.weight": torch.rand(2, 5)}, origin="base")


@pytest.fixture
def adapter(tmp_path):
    """A function that writes an adapter; tensors given as None are left out."""

    def write(tensors=(), **config):
        torch.manual_seed(1)
        stored = {A: torch.rand(2, 3), B: torch.rand(5, 2), **dict(tensors)}
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None},
            tmp_path / "adapter_model.safetensors",
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
        return tmp_path

    return write


def product(folder):
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return stored[B] @ stored[A]


def test_adds_the_scaled_product(adapter, base, assert_reads):
    folder = adapter()
    lora = open_lora(folder, base)
    wanted = {name: base.read(name) for name in base.specs}
    wanted["m.fc.weight"] = wanted["m.fc.weight"] + product(folder) * 4
    assert_reads(lora, wanted)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 8 / math.sqrt(2)),
        ({"alpha_pattern": {"fc": 6}}, 3),
        ({"alpha_pattern": {"m.fc": 6, "fc": 100}}, 3),
        ({"alpha_pattern": {"^m.fc": 6}}, 3),
        ({"alpha_pattern": {"^fc": 6, "c": 7, "m": 9}}, 4),
        ({"r": 9, "rank_pattern": {"fc": 2}}, 4),
        ({"use_dora": False, "lora_bias": None, "target_parameters": [], "init_lora_weights": "gaussian"}, 4),
    ],
)
def test_scale_follows_the_config(config, scale, adapter, base):
    folder = adapter(**config)
    found = open_lora(folder, base).read("m.fc.weight")
    torch.testing.assert_close(found, base.read("m.fc.weight") + product(folder) * scale)


def dora(weight, delta, magnitude):
    """m · (W + ΔW) / ‖W + ΔW‖ in float64, outputs first."""
    changed = (weight + delta).double()
    flat = changed.flatten(1)
    return (magnitude.double()[:, None] * flat / flat.norm(dim=1, keepdim=True)).view(changed.shape)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_dora_is_the_direction_times_the_magnitude_of_each_output(fan_in_fan_out, adapter, base):
    m = torch.rand(5)
    key = "base_model.model.m.fc.lora_magnitude_vector"
    folder = adapter({key: m}, fan_in_fan_out=fan_in_fan_out, use_dora=True)
    lies = Memory({"m.fc.weight": base.read("m.fc.weight").T if fan_in_fan_out else base.read("m.fc.weight")})
    lora = open_lora(folder, lies)
    found = lora.read("m.fc.weight").T if fan_in_fan_out else lora.read("m.fc.weight")
    wanted = dora(base.read("m.fc.weight"), product(folder) * 4, m)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert lora.thin("m.fc.weight") is None


def test_an_embedding_lies_transposed(adapter):
    torch.manual_seed(2)
    table, A, B = torch.rand(7, 5), torch.rand(2, 7), torch.rand(5, 2)
    prefix = "base_model.model.m.e.lora_embedding_"
    lora = open_lora(adapter({prefix + "A": A, prefix + "B": B, **NONE}), Memory({"m.e.weight": table}))
    torch.testing.assert_close(lora.read("m.e.weight"), table + 4 * (B @ A).T)
    assert torch.equal(lora.read("m.e.weight", slice(2, 5)), lora.read("m.e.weight")[2:5])
    start, left, right = lora.thin("m.e.weight")
    torch.testing.assert_close(start + left @ right, lora.read("m.e.weight"))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("window", [(3, 3), (1, 1), (2,)])
def test_a_convolution_is_a_matrix_of_its_windows(use_dora, window, adapter):
    torch.manual_seed(3)
    W, A, B, m = torch.rand(5, 3, *window), torch.rand(2, 3, *window), torch.rand(5, 2, *[1 for _ in window]), torch.rand(5)
    stored = {PREFIX + "m.c.lora_A.weight": A, PREFIX + "m.c.lora_B.weight": B, **NONE}
    if use_dora:
        stored[PREFIX + "m.c.lora_magnitude_vector"] = m.view(1, 5, *[1 for _ in window])
    lora = open_lora(adapter(stored, use_dora=use_dora), Memory({"m.c.weight": W}))
    delta = 4 * torch.einsum("or,r...->o...", B.flatten(1), A)
    wanted = dora(W, delta, m) if use_dora else (W + delta).double()
    torch.testing.assert_close(lora.read("m.c.weight").double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(lora.read_flat("m.c.weight", 4, 11), lora.read("m.c.weight").view(-1)[4:11])


def test_trained_biases_replace_the_bases(adapter, base):
    stored = {PREFIX + "m.fc.base_layer.bias": torch.ones(5), PREFIX + "head.weight": torch.zeros(2, 5)}
    stored |= {PREFIX + "head.original_module.weight": torch.rand(2, 5)}
    lora = open_lora(adapter(stored, bias="all"), base)
    assert torch.equal(lora.read("m.fc.bias"), torch.ones(5))
    assert torch.equal(lora.read("head.weight"), torch.zeros(2, 5))


def test_fan_in_fan_out_transposes(adapter, base):
    folder = adapter(fan_in_fan_out=True)
    flipped = Memory({"m.fc.weight": base.read("m.fc.weight").T})
    lora = open_lora(folder, flipped)
    torch.testing.assert_close(lora.read("m.fc.weight").T, open_lora(adapter(), base).read("m.fc.weight"))
    assert torch.equal(lora.read("m.fc.weight")[1:3], lora.read("m.fc.weight", slice(1, 3)))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_any_chunking_is_bit_for_bit_the_whole(fan_in_fan_out, use_dora, adapter):
    torch.manual_seed(0)
    shape = (700, 900)
    factors = {
        A: torch.rand(2, shape[0] if fan_in_fan_out else shape[1]),
        B: torch.rand(shape[1] if fan_in_fan_out else shape[0], 2),
    }
    if use_dora:
        factors[PREFIX + "m.fc.lora_magnitude_vector"] = torch.rand(factors[B].shape[0])
    config = {"fan_in_fan_out": fan_in_fan_out, "use_dora": use_dora}
    lora = open_lora(adapter(factors, **config), Memory({"m.fc.weight": torch.rand(shape)}))
    whole = lora.read("m.fc.weight").view(-1)
    for step in (1, 899, 12_345, 300_000):
        starts = range(0, whole.numel(), step) if step > 1 else [0, 899, 900, 262_143, 262_144, 629_999]
        for start in starts:
            stop = min(start + step, whole.numel())
            assert torch.equal(lora.read_flat("m.fc.weight", start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype_of_the_base_and_adds_in_float32(dtype, adapter, base):
    cast = Memory({name: base.read(name).to(dtype) for name in base.specs})
    folder = adapter({"base_model.model.head.weight": torch.full((2, 5), 1 / 3)})
    found = open_lora(folder, cast)
    wide = cast.read("m.fc.weight").to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(found.read("m.fc.weight"), (wide + product(folder) * 4).to(dtype))
    assert torch.equal(found.read("head.weight"), torch.full((2, 5), 1 / 3).to(dtype))
    assert found.specs == cast.specs


@pytest.mark.parametrize(
    ("tensors", "config", "what"),
    [
        ({}, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({}, {"use_dora": True}, "'m.fc' has no lora_magnitude_vector, and use_dora is set"),
        ({}, {"lora_bias": True}, "'lora_bias' is True"),
        ({}, {"layer_replication": [[0, 1]]}, "'layer_replication'"),
        ({}, {"from_the_future": 1}, "'from_the_future' is 1"),
        ({}, {"bias": "some"}, "bias is 'some'"),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({}, {"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({}, {"r": 0}, "r is 0"),
        ({}, {"r": True}, "r is True"),
        ({}, {"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({}, {"rank_pattern": {".*fc": 2}}, r"rank_pattern has '\.\*fc'"),
        ({}, {"rank_pattern": [2]}, "rank_pattern must map"),
        ({}, {"alpha_pattern": {"fc": None}}, r"alpha_pattern\['fc'\] is None"),
        ({}, {"r": 3}, r"A \[2, 3\] F32 and B \[5, 2\] F32 of 'm\.fc' are not of rank 3"),
        ({A: torch.zeros(2, 4)}, {}, "'m.fc.weight'.*does not fit"),
        ({A: torch.zeros(2, 3, 1, 1)}, {}, "'m.fc' are of no linear layer or convolution"),
        ({A: torch.zeros(2, 3, 1, 1), B: torch.zeros(5, 2, 1, 1)}, {}, "'m.fc.weight'.*does not fit"),
        ({A: torch.zeros(2, 3, dtype=torch.int64)}, {}, "'m.fc' are not floating-point"),
        ({B: None}, {}, "'m.fc' has lora_A.weight but not its partner"),
        (
            {PREFIX + "m.fc.lora_magnitude_vector": torch.zeros(4)},
            {},
            r"lora_magnitude_vector' \[4\] F32 does not fit 5 outputs",
        ),
        ({PREFIX + "m.fc.lora_B.bias": torch.zeros(5)}, {}, "a part of an adapter that is not understood"),
        (
            {PREFIX + "m.e.lora_embedding_A": torch.zeros(2, 5)},
            {},
            "'m.e' has lora_embedding_A but not its partner",
        ),
        (
            {PREFIX + "m.fd.lora_A.weight": torch.zeros(2, 3), PREFIX + "m.fd.lora_B.weight": torch.zeros(5, 2)},
            {},
            "adapts 'm.fd.weight'",
        ),
        (
            {PREFIX + "heed.weight": torch.zeros(2, 5)},
            {},
            "'base_model.model.heed.weight' matches no tensor of base.*'head.weight'",
        ),
        ({PREFIX + "head.weight": torch.zeros(3, 5)}, {}, "does not fit 'head.weight'"),
        ({PREFIX + "m.fc.weight": torch.zeros(5, 3)}, {}, "both adapts and replaces 'm.fc.weight'"),
        ({"m.fc.lora_A.weight": torch.zeros(2, 3)}, {}, "does not begin with 'base_model.model.'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tensors, config, what, adapter, base):
    with pytest.raises(CheckpointError, match=f"(?s)adapter_.*{what}"):
        open_lora(adapter(tensors, **config), base)


def test_a_pickled_adapter_is_refused(adapter, base):
    folder = adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        open_lora(folder, base)


def test_closing_closes_both(adapter, base):
    lora = open_lora(adapter(), base)
    lora.close()
    with pytest.raises(CheckpointError, match="read after close"):
        lora.read("m.fc.weight")


# ── opened by path ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_base_is_found_beside_the_adapter_or_by_its_path(adapter, base, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    save_tensors(base, tmp_path / "base")
    wanted = open_lora(adapter(), base).read("m.fc.weight")
    for named in ("base", str(tmp_path / "base"), "base/model.safetensors"):
        assert torch.equal(open_path(adapter(base_model_name_or_path=named)).read("m.fc.weight"), wanted)
    folder = adapter(base_model_name_or_path="by-cwd")
    (tmp_path / "cwd").mkdir()
    shutil.move(tmp_path / "base", tmp_path / "cwd" / "by-cwd")
    monkeypatch.chdir(tmp_path / "cwd")
    assert torch.equal(open_path(folder).read("m.fc.weight"), wanted)


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ("meta-llama/Llama-3", "its base 'meta-llama/Llama-3' is no local path"),
        ("x" * 5000, "is no local path"),
        (None, "names no base"),
        (7, "names no base"),
        ("a\0b", "names no base"),
        (".", "is a PEFT adapter, not a model"),
    ],
)
def test_a_base_that_is_not_there_is_named(named, what, adapter):
    with pytest.raises(CheckpointError, match=what):
        open_path(adapter(base_model_name_or_path=named))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at PEFT
def test_equals_peft(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"down_proj": 3, "^model.layers.1.self_attn.q_proj": 4},
        alpha_pattern={"1.self_attn.v_proj": 5, "down_proj": 6},
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # "auto" would ask the network
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, lora = open_folder(tmp_path / "merged"), open_path(tmp_path / "adapter")
    assert lora.specs == merged.specs
    for name in merged.specs:
        torch.testing.assert_close(lora.read(name), merged.read(name), rtol=0, atol=1e-6)
    changed = [name for name in merged.specs if not torch.equal(merged.read(name), lora._base.read(name))]
    assert len(changed) == 7


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_equals_peft_for_conv1d(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # "auto" would ask the network
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = open_folder(tmp_path / "merged")
    lora = open_lora(tmp_path / "adapter", open_folder(tmp_path / "base"))
    for name in merged.specs:
        torch.testing.assert_close(lora.read(name), merged.read(name), rtol=0, atol=1e-6)
