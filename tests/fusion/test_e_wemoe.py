"""E-WEMoE: WEMoE over pruned task vectors, that are held sparse for real, with one router."""

import copy

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, inputs_of, network_of, tasks_of
from torch import nn

import eutectic as eu
from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError, ParameterError
from eutectic.fusion import _products, _sparse
from eutectic.fusion._fusion import ModelSet
from eutectic.fusion._routed import SparseExperts
from eutectic.fusion._routing import gates

SHORT = {"steps": 1, "batch_size": 2}


def models_of(kind, dtype=torch.float64):
    network, width = network_of(kind, dtype)
    return ModelSet(network, base_of(network), experts_of(network)), tasks_of(kind, width, n=12, dtype=dtype)


def fused(name, models, tasks, **parameters):
    return eu.fuse(name, models.network, models.experts, tasks=tasks, **SHORT | parameters)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_the_largest_entries_stay(density):
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    found = _sparse.pruned(x, density)
    assert abs(int((found != 0).sum()) - density * 2000) <= 1
    assert found[found != 0].abs().min() > x[found == 0].abs().max()
    assert torch.equal(found[found != 0], x[found != 0])
    assert _sparse.pruned(x, 1.0) is x
    assert not _sparse.pruned(torch.ones(10), 0.5).any()  # none is strictly above the quantile


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "llama"])
def test_it_is_wemoe_over_pruned_task_vectors(kind):
    models, tasks = models_of(kind)
    inputs = inputs_of(kind, 3)
    mixture = fused("e_wemoe", models, tasks, density=0.3, hidden=1)
    inside = {f"{name}.{key}" for name in mixture.artefact.about["layers"] for key in ("weight", "bias")}
    pruned = {}
    for name, weights in models.experts.items():
        state = eu.state_dict(weights)
        for key in inside & state.keys():
            base = models.base.read(key)
            state[key] = base + _sparse.pruned(state[key] - base, 0.3)
        pruned[name] = Memory(state)
    dense = fused("wemoe", models._replace(experts=pruned), tasks, hidden=1)
    routers = [gate.router for gate in gates(mixture).values()]
    assert len({id(router) for router in routers}) == 1
    with torch.no_grad():
        for parameter in routers[0].parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        for gate in gates(dense).values():
            gate.router.load_state_dict(routers[0].state_dict())
    expected = dense(inputs)
    torch.testing.assert_close(mixture(inputs), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixture(inputs), torch.cat([mixture(one[None]) for one in inputs]), rtol=0, atol=1e-10)
    torch.testing.assert_close(copy.deepcopy(mixture)(inputs), expected, rtol=0, atol=1e-9)


def test_one_router_is_trained_and_there_is_one_in_the_artefact():
    models, tasks = models_of("vit", torch.float32)
    mixture = fused("e_wemoe", models, tasks, steps=40, batch_size=4, lr=1e-2, start="scale")
    history = mixture.artefact.about["history"]
    assert history[-1][2] < 0.98 * history[0][2]
    assert sum(spec.numel for spec in mixture.artefact.tensors.specs.values()) == 2 * 16 + 2
    again = fused("e_wemoe", models, tasks, steps=40, batch_size=4, lr=1e-2, start="scale")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in mixture.state_dict().items())


def test_memory_is_that_of_the_entries_that_are_kept():
    torch.manual_seed(0)
    linear = nn.Linear(768, 3072)
    gaps, values, _ = _products.packed(1e-3 * torch.randn(8, 3072, 768), 0.1)
    nbytes = sum(t.numel() * t.element_size() for t in (gaps, values))
    assert nbytes / (4 * linear.weight.numel()) == pytest.approx(1.0, abs=0.02)


def test_what_cannot_be_is_refused():
    models, tasks = models_of("awkward", torch.float32)
    with pytest.raises(
        LayoutError, match="one router cannot serve blocks whose inputs differ in width: first of 4, frozen of 5"
    ):
        fused("e_wemoe", models, tasks, blocks="(fir|fro).*")
    mixture = fused("e_wemoe", models, tasks, blocks="(fir).*", density=0.5)
    assert isinstance(mixture.first, SparseExperts)
    with pytest.raises(ParameterError, match="density"):
        fused("e_wemoe", models, tasks, density=0.0)
    same = {name: Memory(eu.state_dict(models.base)) for name in models.experts}
    with pytest.raises(LayoutError, match="no expert differs"):
        fused("e_wemoe", models._replace(experts=same), tasks, blocks="(fir).*")
