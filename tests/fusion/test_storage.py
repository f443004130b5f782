"""Where task vectors are held, and what is not held: memory that a fit does without."""

import copy
import weakref

import pytest
import torch
from torch import nn

from eutectic.checkpoint.base import Memory, live
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.checkpoint.save import save_tensors
from eutectic.errors import LayoutError
from eutectic.fusion import _weighted
from eutectic.fusion._api import fit
from eutectic.fusion._fit import descend
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._weighted import Weighted
from eutectic.task import Task


class Counted(Memory):
    """Counts what is read of it."""

    reads = 0

    def _read(self, name, start, stop):
        self.reads += 1
        return super()._read(name, start, stop)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))


def expert_of(network, seed):
    noise = torch.Generator().manual_seed(seed)
    return {name: t + 0.3 * torch.randn(t.shape, generator=noise) for name, t in network.state_dict().items()}


def tasks():
    torch.manual_seed(1)
    return [Task(name, lambda x: x, adapt=(torch.randn(40, 6), torch.zeros(40, dtype=torch.long))) for name in ("a", "b")]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("adamerging", {"steps": 4, "lr": 0.05}), ("concrete_adamerging", {"steps": 2, "mask_steps": 2, "lr": 0.05})],
)
def test_vectors_read_from_files_fit_as_vectors_in_memory(network, tmp_path, method, parameters, monkeypatch):
    monkeypatch.setattr(_weighted, "CHUNK", 7)
    kept = {}
    for name, tensors in {"base": network.state_dict(), "a": expert_of(network, 0), "b": expert_of(network, 1)}.items():
        (tmp_path / name).mkdir()
        save_tensors(Memory(tensors), tmp_path / name)
        kept[name] = SafetensorsFile(tmp_path / name / "model.safetensors")
    models = ModelSet(network, kept.pop("base"), kept)
    found = {
        storage: fit(method, models, tasks(), parameters, Run(storage=storage)).tensors for storage in (None, "files", "memory")
    }
    default, exact, rounded = (tensors.read("weights") for tensors in found.values())
    assert torch.equal(default, exact)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.05)
    assert found["files"].specs == found["memory"].specs


@pytest.mark.parametrize(("storage", "chunk", "reads"), [(torch.bfloat16, 60, 0), (None, 60, 4), (None, 96, 0)])
def test_only_large_vectors_that_are_not_held_are_read_again(network, monkeypatch, storage, chunk, reads):
    monkeypatch.setattr(_weighted, "CHUNK", chunk)  # the matrices have 96 and 64 elements, nothing else more than 16
    base = Memory(copy.deepcopy(network.state_dict()))
    experts = {name: Counted(expert_of(network, seed)) for seed, name in enumerate("ab")}
    equation = Weighted(network, base, experts, storage)
    before = experts["b"].reads
    equation.write(torch.ones(equation.shape, dtype=torch.float64))
    assert experts["b"].reads - before == reads


@pytest.mark.parametrize("storage", [None, torch.float32])
def test_vectors_are_the_same_wherever_they_are(network, monkeypatch, storage):
    monkeypatch.setattr(_weighted, "CHUNK", 7)
    start = copy.deepcopy(network.state_dict())
    experts = {name: Memory(expert_of(network, seed)) for seed, name in enumerate("ab")}
    equation = Weighted(network, Memory(start), experts, storage)
    equation.write(torch.tensor([[0.5], [0.25]]).expand(equation.shape))
    for name, tensor in network.state_dict().items():
        a, b = (expert.read(name) - start[name] for expert in experts.values())
        torch.testing.assert_close(tensor, start[name] + 0.5 * a + 0.25 * b)


def test_a_base_that_is_the_network_itself_does_not_follow_it(network):
    start = copy.deepcopy(network.state_dict())
    equation = Weighted(network, live(network), {"a": Memory(expert_of(network, 0))}, None)
    for weight in (1.0, 0.0):
        equation.write(torch.full(equation.shape, weight, dtype=torch.float64))
    torch.testing.assert_close(network.state_dict(), start, rtol=0, atol=0)


def test_an_expert_of_another_shape_is_refused_before_the_fit(network):
    wide = expert_of(network, 0) | {"0.bias": torch.zeros(17)}
    models = ModelSet(network, Memory(copy.deepcopy(network.state_dict())), {"a": Memory(wide, origin="wide")})
    with pytest.raises(LayoutError, match=r"(?s)wide.*0\.bias"):
        fit("adamerging", models, tasks(), {}, Run())


def test_no_gradient_outlives_its_step():
    state, given = {"x": torch.zeros(3)}, []

    def gradients(step):
        assert state["x"].grad is None
        assert all(reference() is None for reference in given)
        slope = torch.ones(3)
        given.append(weakref.ref(slope))
        return 0.0, {"x": slope}

    descend("x", state, gradients, lambda: 0.0, Run(), steps=3, lr=0.1, patience=5)
    assert len(given) == 3
