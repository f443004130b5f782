"""AdaRank against definitions written with torch's own decomposition, in float64."""

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, network_of, tasks_of
from torch import nn
from torch.func import functional_call

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.fusion import _api, _components, adarank
from eutectic.fusion._coefficients import facts, weighted
from eutectic.fusion._components import Pruned
from eutectic.fusion._fit import Batches, backward, generator
from eutectic.fusion._fusion import Artefact, ModelSet, Run
from eutectic.fusion._losses import entropy
from eutectic.merge.api import state_dict
from eutectic.merge.run import save

RUN = Run(seed=3)
DOUBLE = torch.float64


def setting_of(kind, dtype=DOUBLE):
    network, width = network_of(kind, dtype)
    return ModelSet(network, base_of(network), experts_of(network)), tasks_of(kind, width, dtype=dtype)


def summed(start, experts, coefficients, keep_K):
    """θ₀ + Σₖ λₖ Σ_r Bₖ_r σ_r u_r v_rᵀ of one matrix."""
    theta = start
    for expert, coefficient, keep in zip(experts, coefficients, keep_K, strict=True):
        U, s, Vh = torch.linalg.svd(expert - start, full_matrices=False)
        theta = theta + coefficient * ((U * (keep * s)) @ Vh)
    return theta


def soft(equation):
    """B between 0 and 1, ``[K, r]``, for each matrix; all experts' task vectors have full rank."""
    random = generator("bits")
    return [
        torch.rand(len(equation.rest.names), min(matrix.site.parameter.shape), generator=random, dtype=DOUBLE)
        for matrix in equation.matrices
    ]


@pytest.mark.parametrize("kind", ["awkward", "bert", "gpt2"])
def test_gradients_are_those_of_autograd_through_the_decomposition(kind):
    (network, base, experts), tasks = setting_of(kind)
    batches = Batches(RUN, tasks, 4)
    equation = Pruned(network, base, experts)
    tables = ("embed", "wte", "wpe")
    assert {matrix.site.name for matrix in equation.matrices} == {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim == 2 and parameter.requires_grad and not any(table in name for table in tables)
    }
    weights = torch.randn(2, len(equation.sites), generator=generator("λ"), dtype=DOUBLE).requires_grad_()
    bits_K = [keep.requires_grad_() for keep in soft(equation)]
    thetas = {}
    for at, site in enumerate(equation.sites):
        start, moved = base.read(site.name), [expert.read(site.name) for expert in experts.values()]
        place = at - len(equation.rest.sites)
        if place < 0:
            thetas[site.name] = start + sum(weights[k, at] * (expert - start) for k, expert in enumerate(moved))
        else:
            thetas[site.name] = summed(start, moved, weights[:, at], bits_K[place])
    loss = 0.0
    for task in tasks:
        inputs = batches.inputs(task, batches.index(task, 0))
        loss = loss + entropy(task, task.head(functional_call(network, thetas, (inputs,))), torch.empty(0))
    by_weight, *by_bit = torch.autograd.grad(loss, [weights, *bits_K], materialize_grads=True)

    bits = [keep.detach().reshape(-1) for keep in bits_K]
    equation.write(weights.detach(), bits)
    assert backward(network, batches, 0, entropy, RUN) == pytest.approx(loss.item(), rel=1e-11)
    found_weight, found_bit = equation.gradient(weights.detach(), bits)
    torch.testing.assert_close(found_weight, by_weight, rtol=1e-9, atol=1e-11)
    for found, expected in zip(found_bit, by_bit, strict=True):
        torch.testing.assert_close(found, expected.reshape(-1), rtol=1e-9, atol=1e-11)


def test_all_components_are_adamerging_and_none_is_the_base():
    (network, base, experts), _ = setting_of("awkward")
    equation = Pruned(network, base, experts)
    weights = torch.randn(2, len(equation.sites), generator=generator("λ"), dtype=DOUBLE)
    about = facts(equation, "task_arithmetic", None)
    whole = state_dict(weighted(base, experts, Artefact(Memory({"weights": weights}), about)))
    matrices = [matrix.site for matrix in equation.matrices]
    named = {name for site in matrices for name in (site.name, *site.aliases)}
    assert named == {"first.weight", "twin.weight", "again.weight", "turned"}
    trained = {name for name, tensor in network.state_dict(keep_vars=True).items() if tensor.requires_grad}
    for value in (True, False):
        bits = [torch.full((2, min(site.parameter.shape)), value) for site in matrices]
        equation.write(weights, [keep.reshape(-1).double() for keep in bits])
        tensors = {"weights": weights} | {f"keep.{site.name}": keep for site, keep in zip(matrices, bits, strict=True)}
        streamed = state_dict(adarank._built(base, experts, Artefact(Memory(tensors), about)))
        for name, expected in whole.items():
            if not value and name in named:
                assert torch.equal(streamed[name], base.read(name))
                assert torch.equal(network.state_dict()[name], base.read(name))
                continue
            torch.testing.assert_close(streamed[name], expected, rtol=1e-10, atol=1e-13)
            if name in trained:
                torch.testing.assert_close(network.state_dict()[name], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_a_fit_changes_what_is_kept_lowers_the_entropy_and_is_what_the_equation_says(dtype, tolerance):
    models, tasks = setting_of("awkward", dtype)
    _, base, experts = models
    artefact = _api.fit("adarank", models, tasks, {"steps": 60, "lr": 0.02, "rank": 0.5, "batch_size": 8}, RUN)
    values = [value for *_, value in artefact.about["history"]]
    assert min(values) < values[0]
    kept = {name.removeprefix("keep."): artefact.tensors.read(name) for name in artefact.tensors.specs if name != "weights"}
    assert any(rows.sum() != 2 * round(0.5 * rows.shape[1]) for rows in kept.values())  # not what it began with
    fused, weights = state_dict(_api.fused(base, experts, artefact)), artefact.tensors.read("weights").double()
    for at, (name, *aliases) in enumerate(artefact.about["names"]):
        start, moved = base.read(name).double(), [expert.read(name).double() for expert in experts.values()]
        rows = kept.get(name, torch.ones(2, 1)) if start.ndim == 2 else None
        if rows is None:
            expected = start + sum(weights[k, at] * (expert - start) for k, expert in enumerate(moved))
        else:
            full = torch.zeros(2, min(start.shape))
            full[:, : rows.shape[1]] = rows
            expected = summed(start, moved, weights[:, at], full.double())
        for alias in (name, *aliases):
            assert fused[alias].dtype == dtype
            torch.testing.assert_close(fused[alias].double(), expected, rtol=tolerance, atol=tolerance / 10)


def low_rank(network, ranks, dtype=torch.float32):
    """An expert for each rank, of changes of such a rank in every matrix."""
    found = {}
    for number, rank in enumerate(ranks):
        random = torch.Generator().manual_seed(number)
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        for tensor in state.values():
            if tensor.ndim == 2:
                left, right = (torch.randn(side, rank, generator=random) for side in tensor.shape)
                tensor.add_(0.1 * left @ right.T)
        found[str(number)] = Memory({name: tensor.to(dtype) for name, tensor in state.items()})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_components_are_counted_without_the_rounding_of_what_is_stored(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)).to(dtype)
    base, experts = base_of(network), low_rank(network.float(), (0, 1, 6), dtype)
    equation = Pruned(network.to(dtype), base, experts)
    for matrix in equation.matrices:
        assert torch.bincount(matrix.owner, minlength=3).tolist() == [0, 1, 6]
        assert matrix.place.tolist() == [0, 0, 1, 2, 3, 4, 5]
        assert matrix.strongest(0.5).tolist() == [1, 1, 1, 1, 0, 0, 0]
        assert matrix.strongest(0.0).tolist() == [1, 1, 0, 0, 0, 0, 0]
        assert matrix.strongest(1.0).tolist() == [1] * 7
        rows = matrix.by_expert(matrix.strongest(0.5).bool(), 3).int().tolist()
        assert rows == [[0] * 6, [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
        assert (matrix.A.norm(dim=1)[2:-1] + 1e-6 >= matrix.A.norm(dim=1)[3:]).all() or dtype == torch.bfloat16


def test_saving_decomposes_each_matrix_of_each_expert_once_however_long_it_is(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = nn.Linear(300, 4000, bias=False)  # more than the engine's chunk
    base, experts = base_of(network), low_rank(network, (2, 3))
    equation = Pruned(network, base, experts)
    (matrix,) = equation.matrices
    tensors = {"weights": torch.ones(2, 1), "keep.weight": matrix.by_expert(matrix.strongest(1.0).bool(), 2)}
    built = adarank._built(base, experts, Artefact(Memory(tensors), facts(equation, "task_arithmetic", None)))
    calls, decompose = [], _components.components
    monkeypatch.setattr(_components, "components", lambda *a: calls.append(1) or decompose(*a))
    save(built, tmp_path / "out", threads=1)
    assert len(calls) == 2
    with open_folder(tmp_path / "out") as saved:
        assert torch.equal(saved.read("weight"), built.read("weight"))
        torch.testing.assert_close(
            saved.read("weight"), sum(e.read("weight") for e in experts.values()) - base.read("weight"), rtol=1e-5, atol=1e-5
        )


def test_without_matrices_it_is_adamerging():
    models, tasks = setting_of("awkward")
    same = {name: models.base.read(name) for name, spec in models.base.specs.items() if len(spec.shape) == 2}
    models = models._replace(experts={name: Memory(state_dict(expert) | same) for name, expert in models.experts.items()})
    common = {"steps": 25, "lr": 0.01, "batch_size": 4}
    ours, plain = (_api.fit(name, models, tasks, common, RUN) for name in ("adarank", "adamerging"))
    assert list(ours.tensors.specs) == ["weights"]
    assert torch.equal(ours.tensors.read("weights"), plain.tensors.read("weights"))
    assert ours.about["kept"] == {"a": 0.0, "b": 0.0}
    fused = [state_dict(_api.fused(models.base, models.experts, artefact)) for artefact in (ours, plain)]
    assert all(torch.equal(fused[0][name], fused[1][name]) for name in fused[0])
