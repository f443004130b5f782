"""From a fit to a folder and back to weights, and what is refused on the way."""

import copy
import json

import pytest
import torch
from tests.fusion.networks import Awkward, base_of, experts_of, head_of, inputs_of, network_of, tasks_of
from torch import nn

import eutectic as eu
from eutectic import registry
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.errors import CheckpointError, EutecticError, LayoutError, NonFiniteError, OutputError, ParameterError, TaskError
from eutectic.fusion import _api
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.merge.run import save
from eutectic.task import Arrays, Task

#: those that make weights; the others keep their experts
OTHERS = ("wemoe", "e_wemoe", "smile", "smile_prototypes", *registry.defences())  # tested by themselves
EVERY = [name for name in registry.names("fusion") if name not in OTHERS]
#: those that descend
NAMES = [name for name in EVERY if "lr" in _api.validated(name, {})]


def short(name, **changes):
    """Few steps, whatever a method calls them."""
    known = _api.validated(name, {})
    return {key: 3 for key in known if key.endswith("steps")} | {key: 4 for key in known if key == "batch_size"} | changes


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
def dtype(request):
    return request.param


def setting_of(dtype=torch.float32):
    network, width = network_of("awkward", dtype)
    return ModelSet(network, base_of(network), experts_of(network)), tasks_of("awkward", width, dtype=dtype)


@pytest.fixture
def setting():
    return setting_of()


@pytest.mark.parametrize("name", EVERY)
def test_fitted_saved_loaded_and_streamed_is_what_is_in_memory(name, dtype, tmp_path):
    models, tasks = setting_of(dtype)
    artefact = _api.fit(name, models, tasks, short(name), Run(seed=1))
    in_memory = eu.state_dict(_api.fused(models.base, models.experts, artefact))
    assert any(not torch.equal(in_memory[key], models.base.read(key)) for key in in_memory)
    for key, spec in models.base.specs.items():
        assert (in_memory[key].shape, in_memory[key].dtype) == spec

    _api.save_artefact(artefact, tmp_path / "artefact")
    loaded = _api.load_artefact(tmp_path / "artefact")
    assert json.loads(json.dumps(artefact.about)) == loaded.about
    json.loads((tmp_path / "artefact" / "artefact.json").read_text(), parse_constant=pytest.fail)
    save(_api.fused(models.base, models.experts, loaded), tmp_path / "out", threads=2)
    with open_folder(tmp_path / "out") as streamed:
        assert list(streamed.specs) == list(in_memory)
        for key, tensor in in_memory.items():
            assert torch.equal(streamed.read(key), tensor), key
        some = next(key for key, spec in streamed.specs.items() if len(spec.shape) == 2)
    again = _api.fused(models.base, models.experts, loaded)
    assert torch.equal(again.read(some, slice(1, 3)), in_memory[some][1:3])
    with pytest.raises(OutputError, match="exists already"):
        _api.save_artefact(artefact, tmp_path / "artefact")


@pytest.mark.parametrize("name", NAMES)
def test_the_network_of_the_fit_and_the_built_weights_are_the_same_function(name, setting):
    models, tasks = setting
    artefact = _api.fit(name, models, tasks, short(name), Run())
    backbone, _ = network_of("awkward", torch.float32)
    fused = _api.fuse(name, backbone, models.experts, tasks=tasks, **short(name))
    built = eu.state_dict(_api.fused(models.base, models.experts, artefact))
    for key, tensor in fused.state_dict().items():
        assert torch.equal(tensor, built[key]), key


def test_fuse_leaves_backbone_and_experts_as_they_were(setting):
    models, tasks = setting
    backbone, _ = network_of("awkward", torch.float32)
    backbone.train()
    backbone.first.weight.grad = torch.ones_like(backbone.first.weight)
    before, random = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    experts = {}
    for name, weights in models.experts.items():
        experts[name] = copy.deepcopy(backbone)
        experts[name].load_state_dict(eu.state_dict(weights))
    kept = {name: copy.deepcopy(expert.state_dict()) for name, expert in experts.items()}
    seen = []
    fused = _api.fuse(
        "adamerging", backbone, experts, tasks=tasks, seed=3, progress=lambda *step: seen.append(step), **short("adamerging")
    )
    assert seen == [("coefficients", 1, 3), ("coefficients", 2, 3), ("coefficients", 3, 3)]
    assert torch.equal(torch.get_rng_state(), random)
    assert backbone.training
    assert torch.equal(backbone.first.weight.grad, torch.ones_like(backbone.first.weight))
    for state, module in [(before, backbone), *((kept[name], experts[name]) for name in experts)]:
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[key])

    assert isinstance(fused, Awkward)
    assert not fused.training
    assert fused.again.weight is fused.twin.weight
    flags = {key: parameter.requires_grad for key, parameter in backbone.named_parameters()}
    assert {key: parameter.requires_grad for key, parameter in fused.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in fused.parameters())
    assert fused.artefact.about["seed"] == 3
    assert fused.artefact.about["tasks"] == ["a", "b"]
    again = _api.fused(base_of(backbone), models.experts, fused.artefact)
    assert torch.equal(again.read("turned"), fused.turned)
    assert not any(key.startswith("artefact") for key in fused.state_dict())


def test_networks_whose_layers_cannot_be_routed_are_fused_all_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(24, 6))
    tasks = [Task(name, nn.Identity(), adapt=(torch.randn(8, 3, 8), torch.zeros(8, dtype=torch.long))) for name in "ab"]
    fused = _api.fuse("adamerging", network, experts_of(network), tasks=tasks, **short("adamerging"))
    assert not torch.equal(fused[2].weight, network[2].weight)
    with pytest.raises(LayoutError, match="whose layers cannot be routed"):
        _api.fuse("smile", network, experts_of(network), tasks=[])


def test_protocols_see_different_samples_and_say_so(setting):
    models, tasks = setting
    inductive, transductive = (
        _api.fit("adamerging", models, tasks, short("adamerging"), Run(protocol=p)) for p in ("inductive", "transductive")
    )
    assert not torch.equal(inductive.tensors.read("weights"), transductive.tensors.read("weights"))
    assert (inductive.about["protocol"], transductive.about["protocol"]) == ("inductive", "transductive")


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_artefact_is_applied_to_the_models_of_its_fit_alone(setting):
    models, tasks = setting
    artefact = _api.fit("adamerging", models, tasks, short("adamerging"), Run())
    base, experts = models.base, models.experts
    changed = eu.state_dict(experts["b"])
    changed["norm.weight"][0] += 1
    with pytest.raises(CheckpointError, match=r"<changed>: is not the experts\.b .*hashes differ"):
        _api.fused(base, {"a": experts["a"], "b": Memory(changed, "<changed>")}, artefact)
    with pytest.raises(CheckpointError, match=r"is not the base .*hashes differ"):
        _api.fused(experts["a"], experts, artefact)
    with pytest.raises(CheckpointError, match=r"fitted for base, experts\.a, experts\.b, not for base, experts\.b"):
        _api.fused(base, {"b": experts["b"]}, artefact)
    with pytest.raises(CheckpointError, match="not for base, experts.b, experts.a"):
        _api.fused(base, dict(reversed(experts.items())), artefact)


def broken(folder, how):
    about, weights = folder / "artefact.json", folder / "model.safetensors"
    said = json.loads(about.read_text())
    match how:
        case "no json":
            about.unlink()
        case "half a json":
            about.write_text(about.read_text()[:50])
        case "not utf-8":
            about.write_bytes(b"\xff\xfe{}")
        case "a list":
            about.write_text("[1]")
        case "no parameters":
            about.write_text(json.dumps({k: v for k, v in said.items() if k != "parameters"}))
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-3])
        case "models is a list":
            about.write_text(json.dumps(said | {"models": ["base"]}))


@pytest.mark.parametrize(
    "how", ["no json", "half a json", "not utf-8", "a list", "no parameters", "no weights", "cut weights", "models is a list"]
)
def test_a_broken_folder_is_refused_by_its_files_name(how, setting, tmp_path):
    models, tasks = setting
    folder = tmp_path / "artefact"
    _api.save_artefact(_api.fit("adamerging", models, tasks, short("adamerging"), Run()), folder)
    broken(folder, how)
    name = r"model\.safetensors" if "weights" in how else r"artefact\.json"
    with pytest.raises(CheckpointError, match=name):
        _api.fused(models.base, models.experts, _api.load_artefact(folder))
    with pytest.raises(CheckpointError, match=r"nowhere.artefact\.json"):
        _api.load_artefact(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": None}, "lack `over` or `names`"),
        ({"over": {"parameters": {}}}, "lack `over` or `names`"),
        ({"names": [["first.weight"]]}, r"`weights` is \[2, 7\] F32, not .* \[2, 1\]"),
        ({"names": [["nothing"]] * 7}, "nothing"),
    ],
    ids=["no names", "no method", "too few names", "unknown names"],
)
def test_facts_that_do_not_fit_the_tensors_are_refused(change, words, setting):
    models, tasks = setting
    artefact = _api.fit("adamerging", models, tasks, short("adamerging"), Run())
    about = {key: value for key, value in (dict(artefact.about) | change).items() if value is not None}
    with pytest.raises(EutecticError, match=words):
        _api.fused(models.base, models.experts, artefact._replace(about=about))


def test_an_artefact_of_an_unknown_method_or_parameter_is_refused(setting):
    models, tasks = setting
    artefact = _api.fit("adamerging", models, tasks, short("adamerging"), Run())
    with pytest.raises(EutecticError, match="adamergin'"):
        _api.fused(models.base, models.experts, artefact._replace(about=dict(artefact.about) | {"method": "adamergin"}))
    with pytest.raises(ParameterError, match="speed"):
        _api.fused(models.base, models.experts, artefact._replace(about=dict(artefact.about) | {"parameters": {"speed": 1}}))


def changed(tasks, **splits):
    """The tasks, with another split or head of the second."""
    given = {"head": tasks[1].head, "adapt": tasks[1].arrays("adapt")} | splits
    return [tasks[0], Task("b", given.pop("head"), **{key: split for key, split in given.items() if split is not None})]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapt": None}, r"task 'b' has no split 'adapt'"),
        ({"adapt": Arrays(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))}, r"task 'b'.*'adapt' is empty"),
        ({"adapt": [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]}, r"task 'b'.*'adapt' is a stream"),
        ({"head": head_of(4, 3, dtype=torch.float32)}, r"task 'b': its head does not fit features \(\d+, 3\)"),
        ({"head": lambda features: features[0]}, r"task 'b': its head gives \(3,\), not logits"),
        ({"head": lambda features: features.detach()}, r"task 'b'.*gradient"),
    ],
    ids=["no split", "empty split", "stream", "wrong head", "one row", "no graph"],
)
def test_tasks_that_cannot_be_adapted_to_are_named(name, change, words, setting):
    models, tasks = setting
    with pytest.raises(TaskError, match=words):
        _api.fit(name, models, changed(tasks, **change), short(name), Run())


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_fitted_is_named(name, setting):
    models, tasks = setting
    network, base, experts = models
    with pytest.raises(TaskError, match="no tasks"):
        _api.fit(name, models, [], short(name), Run())
    with pytest.raises(TaskError, match="'a'.*twice|two tasks.*'a'"):
        _api.fit(name, models, [*tasks, tasks[0]], short(name), Run())
    with pytest.raises(LayoutError, match="no experts"):
        _api.fit(name, models._replace(experts={}), tasks, short(name), Run())
    sick = eu.state_dict(experts["b"])
    sick["twin.bias"][0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"'b' \(<sick>\).*'(twin|norm)\.bias'"):
        _api.fit(name, models._replace(experts=experts | {"b": Memory(sick, "<sick>")}), tasks, short(name), Run())
    other = base_of(Awkward(width=6))
    with pytest.raises(LayoutError, match=r"'b'.*does not fit"):
        _api.fit(name, models._replace(experts=experts | {"b": other}), tasks, short(name), Run())
    lacking = {key: tensor for key, tensor in eu.state_dict(experts["b"]).items() if key != "turned"}
    with pytest.raises(LayoutError, match="turned"):
        _api.fit(name, models._replace(experts=experts | {"b": Memory(lacking)}), tasks, short(name), Run())
    with pytest.raises(LayoutError, match="no expert differs"):
        _api.fit(name, models._replace(experts={"a": base, "b": base}), tasks, short(name), Run())
    with pytest.raises(LayoutError, match="no expert differs"):
        _api.fit(name, models._replace(network=copy.deepcopy(network).requires_grad_(False)), tasks, short(name), Run())
    with pytest.raises(ParameterError, match="batch_size"):
        _api.fit(name, models, tasks, {"batch_size": 0}, Run())


def test_an_expert_cannot_take_the_bases_name_and_teachers_are_asked_for_by_the_tasks(setting):
    models, tasks = setting
    experts = dict(zip(("base", "b"), models.experts.values(), strict=True))
    with pytest.raises(LayoutError, match="'base'"):
        _api.fit("adamerging", models._replace(experts=experts), tasks, short("adamerging"), Run())
    experts = dict(zip("ac", models.experts.values(), strict=True))
    with pytest.raises(TaskError, match="'b' has no expert of its name; there are a, c"):
        _api.fit("expert_adamerging", models._replace(experts=experts), tasks, short("expert_adamerging"), Run())
    assert _api.fit("adamerging", models._replace(experts=experts), tasks, short("adamerging"), Run())


# ── the edges of what works ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_one_and_a_single_sample_and_expert_work(name, setting):
    models, tasks = setting
    one = Task("a", tasks[0].head, adapt=Arrays(inputs_of("awkward", 1, dtype=torch.float32), torch.zeros(1, dtype=torch.long)))
    alone = models._replace(experts={"a": models.experts["a"]})
    artefact = _api.fit(name, alone, [one], short(name, batch_size=1), Run())
    for tensor in eu.state_dict(_api.fused(alone.base, alone.experts, artefact)).values():
        assert torch.isfinite(tensor).all()
    assert [value for *_, value in artefact.about["history"]] == [None, None]


def test_fitting_works_where_gradients_are_off(setting):
    models, tasks = setting
    expected = _api.fit("adamerging", models, tasks, short("adamerging"), Run()).tensors.read("weights")
    with torch.no_grad():
        found = _api.fit("adamerging", models, tasks, short("adamerging"), Run()).tensors.read("weights")
    assert torch.equal(found, expected)


def test_networks_of_half_precision_and_autocast_are_fitted(setting):
    models, tasks = setting
    exact = _api.fit("adamerging", models, tasks, short("adamerging"), Run())
    rough = _api.fit("adamerging", models, tasks, short("adamerging"), Run(autocast=True))
    for (_, _, a), (_, _, b) in zip(exact.about["history"], rough.about["history"], strict=True):
        assert a == pytest.approx(b, rel=0.05)
        assert a != b


def test_parameters_that_no_expert_changed_are_not_differentiated():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    base = base_of(network)
    experts = {name: Memory(eu.state_dict(e) | {"0.weight": base.read("0.weight")}) for name, e in experts_of(network).items()}
    tasks = tasks_of("awkward", 3, dtype=torch.float32)
    fused = _api.fuse("adamerging", network, experts, tasks=tasks, **short("adamerging"))
    assert all(parameter.grad is None for parameter in fused.parameters())
    assert all(parameter.requires_grad for parameter in fused.parameters())
