"""PWE-MoE: begun at interpolation, exact gradients through the routers, and unloaded at any preference to what was fitted."""

import copy

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, network_of, tasks_of
from torch.func import functional_call

import eutectic as eu
from eutectic.errors import LayoutError, ParameterError, TaskError
from eutectic.fusion import _api, pwe_moe
from eutectic.fusion._fit import Batches, Descended
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._losses import divergence_from, entropy, expert_outputs
from eutectic.fusion._preferences import dirichlet, exact, min_norm, simplex_grid
from eutectic.fusion._weighted import Weighted

NAMES = {2: ("a", "b"), 3: ("a", "b", "c"), 8: tuple("abcdefgh")}
STILL = {"steps": 1, "batch_size": 2, "lr": 1e-12}
SHORT = {"steps": 5, "batch_size": 4, "lr": 0.1}


def setting(k=2, kind="awkward", dtype=torch.float64):
    network, width = network_of(kind, dtype)
    return ModelSet(network, base_of(network), experts_of(network, NAMES[k])), tasks_of(kind, width, NAMES[k], 12, dtype)


def fitted(models, tasks, run=None, **parameters):
    return _api.fit("pwe_moe", models, tasks, parameters, run or Run())


def unloaded(models, artefact, preference):
    return eu.state_dict(_api.unloaded(models.base, models.experts, artefact, preference))


def close(left, right, atol):
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol, msg=lambda said, name=name: f"{name}: {said}")


# ── what it begins with ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hidden", [1, 2])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_it_begins_at_interpolation_and_the_corners_are_the_experts(k, hidden):
    models, tasks = setting(k)
    artefact = fitted(models, tasks, hidden=hidden, **STILL)
    frozen = {name for name, p in models.network.named_parameters() if not p.requires_grad}
    buffers = {name for name, _ in models.network.named_buffers()}
    routed = set(models.base.specs) - frozen - buffers
    for p in [*torch.eye(k).tolist(), dirichlet(k, 1.0, 3).tolist()]:
        found = unloaded(models, artefact, p)
        mixed = eu.state_dict(eu.merge("task_arithmetic", models.base, models.experts, scale=1.0, weights=p))
        close({name: found[name] for name in routed}, {name: mixed[name] for name in routed}, 1e-9)
    mean = eu.state_dict(eu.merge("average", models.base, models.experts))
    close({name: found[name] for name in frozen}, {name: mean[name] for name in frozen}, 1e-12)


def test_routers_without_a_layer_follow_no_preference_and_begin_where_they_are_fitted():
    models, tasks = setting(2)
    for only, weights in ((None, [0.5, 0.5]), ([0.25, 0.75], [0.25, 0.75]), ({"b": 1.0}, [0.0, 1.0])):
        artefact = fitted(models, tasks, hidden=0, only=only, **STILL)
        mixed = eu.merge("task_arithmetic", models.base, models.experts, scale=1.0, weights=weights)
        for p in ([1, 0], [0.5, 0.5]):
            torch.testing.assert_close(unloaded(models, artefact, p)["turned"], mixed.read("turned"), rtol=0, atol=1e-9)


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def oracle(models, tasks, state, p, step, target, how):
    """∂ Σ αₖ Lₖ by the routers, by autograd through routers, merge and network in one graph, in float64."""
    run = Run()
    loss = entropy if target == "entropy" else divergence_from(expert_outputs(models, tasks, run))
    batches, names = Batches(run, tasks, 4), list(models.experts)
    parameters = {name: q for name, q in models.network.named_parameters() if q.requires_grad}
    fixed = eu.state_dict(eu.merge("average", models.base, models.experts))
    routers = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    theta = {name: tensor for name, tensor in fixed.items() if name not in parameters}
    for number, name in enumerate(parameters):
        hidden = torch.relu(routers["weight.0"][number] @ p + routers["bias.0"][number])
        weights = routers["weight.1"][number] @ hidden + routers["bias.1"][number]
        start = models.base.read(name)
        theta[name] = start + sum(w * (models.experts[e].read(name) - start) for w, e in zip(weights, names, strict=True))
    if "again.weight" in fixed:
        theta["again.weight"] = theta["twin.weight"]
    losses = []
    for task in tasks:
        index = batches.index(task, step)
        losses.append(loss(task, task.head(functional_call(models.network, theta, batches.inputs(task, index))), index))
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(one, routers.values(), retain_graph=True)]) for one in losses]
    )
    values = torch.stack(losses).detach()
    alpha = {"linear": lambda: p, "mgda": lambda: min_norm(rows @ rows.T), "epo": lambda: exact(rows @ rows.T, values, p)}[
        how
    ]()
    return float(p @ values), alpha @ rows


@pytest.mark.parametrize("how", ["linear", "epo", "mgda"])
@pytest.mark.parametrize(("k", "target", "kind"), [(2, "experts", "awkward"), (3, "entropy", "awkward"), (2, "experts", "vit")])
def test_a_step_is_that_of_autograd_through_the_whole_merge(how, k, target, kind, monkeypatch):
    models, tasks = setting(k, kind)
    seen = []

    def descend(what, state, gradients, criterion, run, **settings):
        for name, tensor in state.items():  # away from where it begins
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)), dtype=tensor.dtype)
        seen.append((state, [gradients(step) for step in range(3)]))
        return Descended(state, [])

    monkeypatch.setattr(pwe_moe, "descend", descend)
    fitted(models, tasks, scalarisation=how, target=target, batch_size=4)
    ((state, steps),) = seen
    for step, (value, found) in enumerate(steps):
        expected, gradient = oracle(models, tasks, state, dirichlet(k, 1.0, 0, step), step, target, how)
        assert value == pytest.approx(expected, rel=1e-9)
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(torch.cat([g.flatten() for g in found.values()]), gradient, rtol=1e-7, atol=1e-10)


# ── unloading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_unloading_is_the_network_of_the_fit_at_every_preference(k, dtype, atol):
    models, tasks = setting(k, dtype=dtype)
    artefact = fitted(models, tasks, **SHORT)
    state = {name: artefact.tensors.read(name) for name in artefact.tensors.specs}
    network = copy.deepcopy(models.network)
    equation = Weighted(network, models.base, models.experts, torch.float32)
    seen = []
    for p in simplex_grid(k, 2 if k < 8 else 1):
        weights = pwe_moe.routed(state, p, artefact.about["blocks"])
        equation.write(weights)
        found = unloaded(models, artefact, p.tolist())
        close(found, {name: network.state_dict()[name] for name in found}, atol)
        seen.append(weights)
    assert (torch.stack(seen).std(0) > 1e-3).all()  # preferences make a difference


def test_the_fit_depends_on_no_preference_and_a_loaded_artefact_is_applied_at_any(tmp_path):
    models, tasks = setting(2)
    one = fitted(models, tasks, Run(folder=tmp_path / "state"), **SHORT)
    kept = len(list((tmp_path / "state").iterdir()))
    two = fitted(models, tasks, Run(folder=tmp_path / "state"), preference={"b": 1.0}, **SHORT)
    assert len(list((tmp_path / "state").iterdir())) == kept == 1
    close(eu.state_dict(one.tensors), eu.state_dict(two.tensors), 0)
    _api.save_artefact(one, tmp_path / "artefact")
    loaded = _api.load_artefact(tmp_path / "artefact")
    corner = eu.state_dict(_api.fused(models.base, models.experts, two))
    close(unloaded(models, loaded, [0, 1]), corner, 0)
    close(unloaded(models, loaded, {"b": 1}), corner, 0)
    close(unloaded(models, loaded, [0.5, 0.5]), eu.state_dict(_api.fused(models.base, models.experts, one)), 0)
    assert _api.with_parameters(loaded, {"preference": [0.0, 1.0]}).about["parameters"]["preference"] == [0.0, 1.0]
    with pytest.raises(ParameterError, match=r"lr = 0.2, but the artefact was fitted with 0.1"):
        _api.with_parameters(loaded, {"lr": 0.2})


def test_experts_that_are_the_same_are_what_every_preference_gives():
    models, tasks = setting(2)
    models = models._replace(experts={"a": models.experts["a"], "b": models.experts["a"]})
    artefact = fitted(models, tasks, scalarisation="epo", **SHORT)
    for p in ([1, 0], [0.25, 0.75]):
        close(unloaded(models, artefact, p), eu.state_dict(models.experts["a"]), 1e-9)


def test_fitting_lowers_the_weighted_losses_that_it_did_not_see():
    models, tasks = setting(3)
    for how in ("linear", "epo"):
        artefact = fitted(models, tasks, scalarisation=how, steps=60, batch_size=4)
        values = [value for *_, value in artefact.about["history"]]
        assert min(values) < 0.95 * values[0]


# ── which tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_mlps_alone_each_has_one_router_and_all_else_is_task_arithmetic():
    models, tasks = setting(2, "vit")
    artefact = fitted(models, tasks, blocks=pwe_moe.MLP, scale=0.2, **SHORT)
    assert len(set(artefact.about["blocks"])) == 2
    assert artefact.tensors.spec("weight.0").shape == (2, 4, 2)
    inside = {name for group in artefact.about["names"] for name in group}
    assert len(inside) == 8
    found = unloaded(models, artefact, [0.9, 0.1])
    arithmetic = eu.state_dict(eu.merge("task_arithmetic", models.base, models.experts, scale=0.2))
    outside = [name for name in found if name not in inside]
    close({name: found[name] for name in outside}, {name: arithmetic[name] for name in outside}, 1e-12)
    state = {name: artefact.tensors.read(name) for name in artefact.tensors.specs}
    weights = pwe_moe.routed(state, torch.tensor([0.9, 0.1], dtype=torch.float64), artefact.about["blocks"])
    assert torch.equal(weights[:, :4], weights[:, :1].expand(2, 4))  # one router for all tensors of a block
    assert not torch.equal(weights[:, 0], weights[:, 4])


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        ({"preference": [1.5, -0.5]}, ParameterError, "-0.5 is negative"),
        ({"preference": [0.5, 0.6]}, ParameterError, "sum is 1.1, not 1"),
        ({"preference": [0.5, 0.25, 0.25]}, ParameterError, "3 weights for 2 experts"),
        ({"preference": {"x": 1.0}}, ParameterError, "no expert 'x'"),
        ({"only": [2.0, -1.0]}, ParameterError, r"only = .*-1.0 is negative"),
        ({"blocks": "(", **STILL}, ParameterError, "no regular expression"),
        ({"blocks": "nothing.*", **STILL}, LayoutError, r"no tensor is called like 'nothing.*; there are turned, first.weight"),
    ],
)
def test_bad_parameters_are_refused(parameters, error, says):
    with pytest.raises(error, match=says):
        fitted(*setting(2), **parameters)


def test_an_expert_without_a_task_and_more_objectives_than_epo_takes_are_refused():
    models, tasks = setting(2)
    with pytest.raises(TaskError, match="expert 'b' has no task"):
        fitted(models, tasks[:1])
    network, width = network_of("awkward")
    names = tuple("abcdefghi")
    many = ModelSet(network, base_of(network), experts_of(network, names))
    with pytest.raises(ParameterError, match="at most 8 objectives, not 9"):
        fitted(many, tasks_of("awkward", width, names), scalarisation="epo")
