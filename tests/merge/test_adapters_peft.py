"""Adapters in all of PEFT's layouts, with PEFT as the oracle, and the way back into it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.peft import open_adapter
from eutectic.merge.adapters import Fused
from eutectic.merge.run import save

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, at its own defaults

TARGETS = ["emb", "conv", "point", "line", "fc", "out"]


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc, self.out = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 5)
        self.conv, self.point, self.line = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 2)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, ids, image):
        words = self.head(self.norm(self.out(self.fc(self.emb(ids)).tanh())))
        return words, self.line(self.point(self.conv(image)).flatten(2))


def net():
    torch.manual_seed(0)
    return Net()


def adapter(folder, seed, **config):
    """A folder that PEFT wrote, and the state of the network after PEFT merged it."""
    torch.manual_seed(seed)
    said = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **config}
    model = peft.get_peft_model(net(), peft.LoraConfig(**said))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    return folder, model.eval().merge_and_unload().state_dict()


LAYOUTS = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"fc": 3, "^conv": 1}, "alpha_pattern": {"fc": 7, "emb": 2}},
    "dora": {"use_dora": True},
    "saved": {"target_modules": ["fc"], "modules_to_save": ["head", "norm"]},
    "biases": {"bias": "all", "modules_to_save": ["head"]},
    "own biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_is_what_peft_merges(layout, tmp_path):
    folder, wanted = adapter(tmp_path / "a", 1, **LAYOUTS[layout])
    lora = open_lora(folder, Memory(net().state_dict()))
    changed = 0
    for name, tensor in net().state_dict().items():
        torch.testing.assert_close(lora.read(name), wanted[name], rtol=0, atol=2e-6)
        changed += not torch.equal(lora.read(name), tensor)
    assert changed >= 5


@pytest.mark.parametrize("layout", ["lora", "rslora", "saved", "biases", "own biases"])
@pytest.mark.parametrize("space", ["core", "knots", "concat"])
def test_a_fused_adapter_goes_back_into_peft(layout, space, tmp_path):
    config = LAYOUTS[layout]
    folders = {str(seed): adapter(tmp_path / str(seed), seed, **(config if seed == 1 else {}))[0] for seed in (1, 2)}
    base = Memory(net().state_dict())
    fused = Fused("average", {name: open_adapter(folder) for name, folder in folders.items()}, base=base, space=space)
    save(fused, tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "out")
    state = loaded.eval().merge_and_unload().state_dict()
    views = [open_lora(folder, base) for folder in folders.values()]
    again = open_lora(tmp_path / "out", base)
    for name in state:
        wanted = sum(view.read(name).double() for view in views) / 2
        torch.testing.assert_close(state[name].double(), wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(again.read(name).double(), wanted, rtol=0, atol=2e-6)


def test_the_fused_network_computes_the_same_while_adapted(tmp_path):
    folders = {str(seed): adapter(tmp_path / str(seed), seed)[0] for seed in (1, 2)}
    save(Fused("ties", {name: open_adapter(folder) for name, folder in folders.items()}), tmp_path / "out")
    ids, image = torch.arange(11), torch.rand(2, 3, 6, 6)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "out").eval()
    dense = net()
    dense.load_state_dict({n: open_lora(tmp_path / "out", Memory(net().state_dict())).read(n) for n in dense.state_dict()})
    for found, wanted in zip(loaded(ids, image), dense(ids, image), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_equals_pefts_exact_merges_and_not_its_factor_wise_one(tmp_path):
    """PEFT's ``cat`` and ``svd`` are Σ wᵢ ΔWᵢ; its ``linear`` sums the factors, and is off by the cross terms."""
    config = {"target_modules": ["fc", "out"]}
    folders = {str(seed): adapter(tmp_path / str(seed), seed, **config)[0] for seed in (1, 2)}
    model = peft.PeftModel.from_pretrained(net(), folders["1"], adapter_name="1")
    model.load_adapter(folders["2"], "2")
    found = {}
    for kind in ("cat", "svd", "linear"):
        more = {"svd_rank": 4} if kind == "svd" else {}
        model.add_weighted_adapter(["1", "2"], [0.5, 0.5], kind, combination_type=kind, **more)
        layer = model.base_model.model.fc
        found[kind] = layer.get_delta_weight(kind).double()
    fused = Fused("average", {name: open_adapter(folder) for name, folder in folders.items()})
    B, A = (fused.read(f"base_model.model.fc.lora_{kind}.weight").double() for kind in "BA")
    torch.testing.assert_close(B @ A, found["cat"], rtol=0, atol=1e-6)
    torch.testing.assert_close(B @ A, found["svd"], rtol=0, atol=1e-6)
    B1, B2 = (layer.lora_B[name].weight.double() for name in "12")
    A1, A2 = (layer.lora_A[name].weight.double() for name in "12")
    cross = 1.5 / 2 * (B1 @ A2 + B2 @ A1)
    torch.testing.assert_close(found["linear"] - B @ A, cross, rtol=0, atol=1e-6)
    assert cross.norm() > 0.3 * (B @ A).norm()


def test_ranks_that_differ_are_patterns_that_peft_reads(tmp_path):
    folder, _ = adapter(tmp_path / "a", 1, rank_pattern={"fc": 4})
    save(Fused("average", {"a": open_adapter(folder)}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {"^fc": 4})
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "out")
    assert loaded.base_model.model.fc.scaling == {"default": 1.0}
