"""A mixture in a folder is the mixture in memory, bit for bit, and a folder that lies is refused."""

import copy
import json

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, inputs_of, network_of, tasks_of
from torch import nn

import eutectic as eu
from eutectic.bench.backbones import backbone
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.errors import CheckpointError, LayoutError
from eutectic.fusion import _api
from eutectic.fusion._folder import layers_of
from eutectic.fusion._fusion import ModelSet, Run

PARAMETERS = {
    "smile": {"rank": 3, "gate_rank": 2},
    "smile_prototypes": {"rank": 3},
    "smile_prototypes, looking ahead": {"rank": 3, "ahead": True},
    "wemoe": {"steps": 2, "lr": 0.1, "batch_size": 2},
    "e_wemoe": {"steps": 2, "lr": 0.1, "batch_size": 2, "density": 0.3},
}


def setting_of(kind, name):
    """The models, tasks and parameters of a variant, whose method is its name's first word."""
    network, width = network_of(kind, torch.float32)
    tasks = tasks_of(kind, width, n=8, dtype=torch.float32)
    parameters = PARAMETERS[name] | ({"blocks": "(fir).*"} if "wemoe" in name and kind == "awkward" else {})
    return ModelSet(network, base_of(network), experts_of(network)), tasks, parameters


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "llama", "awkward"])
@pytest.mark.parametrize("name", list(PARAMETERS))
def test_saved_from_memory_and_streamed_it_loads_to_the_same_bits(name, kind, tmp_path):
    models, tasks, parameters = setting_of(kind, name)
    mixture = eu.fuse(name.split(",")[0], models.network, models.experts, tasks=tasks, **parameters)
    inputs = inputs_of(kind, 3)
    inputs = inputs.float() if inputs.dtype == torch.float64 else inputs
    expected = mixture(inputs)
    eu.save(mixture, tmp_path / "memory")
    artefact = mixture.artefact
    eu.save(_api.fused(models.base, models.experts, artefact), tmp_path / "streamed")
    with open_folder(tmp_path / "memory") as memory, open_folder(tmp_path / "streamed") as streamed:
        assert streamed.specs.keys() - memory.specs.keys() <= {
            "again.weight",
            "model.lm_head.weight",
        }  # a tied tensor by its other name
        assert all(torch.equal(memory.read(key), streamed.read(key)) for key in memory.specs)
    loaded = eu.load(tmp_path / "memory", copy.deepcopy(models.network))
    assert torch.equal(loaded(inputs), expected)
    assert torch.equal(eu.load(tmp_path / "streamed", copy.deepcopy(models.network))(inputs), expected)
    assert not loaded.training
    assert layers_of(tmp_path / "memory") == artefact.about["layers"]
    assert {k: t.shape for k, t in loaded.state_dict().items()} == {k: t.shape for k, t in mixture.state_dict().items()}


def test_transformers_networks_are_made_from_their_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config).eval()
    network.save_pretrained(tmp_path / "base")
    mixture = eu.fuse("smile", network, experts_of(network), tasks=[], rank=4, gate_rank=2)
    eu.save(mixture, tmp_path / "out")
    loaded = eu.load(tmp_path / "out")
    ids = torch.arange(12).view(2, 6)
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    assert torch.equal(loaded(ids).logits, mixture(ids).logits)
    assert not torch.equal(loaded(ids).logits, network(ids).logits)
    assert torch.equal(eu.load(tmp_path / "base")(ids).logits, network(ids).logits)  # a plain model, too
    import eutectic.auto  # noqa: F401 — which registers the class

    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        assert torch.equal(auto.from_pretrained(tmp_path / "out")(ids).logits, mixture(ids).logits)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").base_config["hidden_size"] == 16
    assert mixture.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 9)


def test_names_that_transformers_changes_as_it_loads_are_found(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(tmp_path / "base")
    base = open_folder(tmp_path / "base")
    assert base.specs.keys() != network.state_dict().keys()
    experts = {name: Memory({k: base.read(k) + 0.1 * torch.randn(s.shape) for k, s in base.specs.items()}) for name in "ab"}
    suites = backbone(tmp_path / "base" / "config.json", base, "cls")
    artefact = _api.fit("smile", ModelSet(suites, base, experts), [], {"rank": 3, "gate_rank": 2}, Run())
    eu.save(_api.fused(base, experts, artefact), tmp_path / "out")
    images = torch.randn(3, 3, 8, 8)
    loaded = eu.load(tmp_path / "out")
    assert isinstance(loaded, transformers.Dinov2Model)
    ours = eu.load(tmp_path / "out", suites)(images)
    torch.testing.assert_close(loaded(images).pooler_output, ours, rtol=0, atol=1e-5)
    assert (ours - network(images).pooler_output).abs().max() > 0.1
    eu.save(loaded, tmp_path / "again")  # under the names of the network
    assert torch.equal(eu.load(tmp_path / "again")(images).pooler_output, loaded(images).pooler_output)
    assert torch.equal(eu.load(tmp_path / "base")(images).pooler_output, network(images).pooler_output)


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    models, tasks, parameters = setting_of("vit", "smile")
    eu.save(eu.fuse("smile", models.network, models.experts, tasks=tasks, **parameters), tmp_path / "out")
    with pytest.raises(LayoutError):
        eu.load(tmp_path / "out", nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(CheckpointError, match="says nothing of the base's network; give a `backbone`"):
        eu.load(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    said = json.loads(config.read_text())
    some = next(iter(said["layers"]))
    for changes, message in (
        ({"rank": 10**12}, "where the description has"),
        ({"experts": -1}, "cannot have experts"),
        ({"kind": "pickle"}, "no routed layer is described"),
        ({"top": "1"}, "no routed layer is described"),
    ):
        config.write_text(json.dumps(said | {"layers": said["layers"] | {some: said["layers"][some] | changes}}))
        with pytest.raises(LayoutError, match=message):
            eu.load(tmp_path / "out", copy.deepcopy(models.network))
    config.write_text(json.dumps(said | {"layers": []}))
    with pytest.raises(CheckpointError, match="no `layers`"):
        eu.load(tmp_path / "out", copy.deepcopy(models.network))
    config.write_text(json.dumps(said | {"layers": {}}))
    with pytest.raises(LayoutError, match="unexpected|lacks|only"):
        eu.load(tmp_path / "out", copy.deepcopy(models.network))


def test_a_fit_says_what_it_routes():
    models, tasks, parameters = setting_of("vit", "wemoe")
    about = _api.fit("wemoe", models, tasks, parameters, Run()).about
    assert json.loads(json.dumps(about["layers"])) == about["layers"]
    assert sum("router" in one for one in about["layers"].values()) == 2


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_a_mixture_can_be_exported(name):
    models, tasks, parameters = setting_of("vit", name)
    mixture = eu.fuse(name.split(",")[0], models.network, models.experts, tasks=tasks, **parameters)
    inputs = inputs_of("vit", 4).float()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(mixture, (inputs,), dynamic_shapes=({0: batch},))
    other = inputs_of("vit", 7, seed=3).float()
    torch.testing.assert_close(program.module()(other), mixture(other))
