"""WEMoE: routed by sample, begun at task arithmetic, exact at its corners, and only its routers are trained."""

import copy

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, inputs_of, network_of, tasks_of
from torch import nn

import eutectic as eu
from eutectic.checkpoint.base import Memory
from eutectic.errors import CheckpointError, LayoutError, ParameterError
from eutectic.fusion import _api, _mixing, _products, _routing
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._routed import MergedExperts
from eutectic.fusion._routing import gates
from eutectic.task import Arrays, Task

SHORT = {"steps": 1, "batch_size": 2}


def models_of(kind, dtype=torch.float64):
    network, width = network_of(kind, dtype)
    return ModelSet(network, base_of(network), experts_of(network)), tasks_of(kind, width, n=12, dtype=dtype)


def fused(models, tasks, **parameters):
    return eu.fuse("wemoe", models.network, models.experts, tasks=tasks, **SHORT | parameters)


def routers(mixture):
    return [gate.router for gate in gates(mixture).values()]


@torch.no_grad()
def set_to(mixture, c):
    """Whatever the input, the coefficients are these."""
    for router in routers(mixture):
        for parameter in router.parameters():
            parameter.zero_()
        router[-1].bias.copy_(torch.tensor(c, dtype=torch.float64))


def filled(network, state):
    network = copy.deepcopy(network)
    network.load_state_dict(state)
    return network


def spread(mixture):
    """Routers that tell samples apart."""
    with torch.no_grad():
        for number, router in enumerate(routers(mixture)):
            for parameter in router.parameters():
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(number))
    return mixture


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "bert", "gpt2", "t5", "llama"])
def test_every_mlp_is_found_and_nothing_else_and_the_corners_are_exact(kind):
    models, tasks = models_of(kind)
    mixture, inputs = fused(models, tasks, hidden=1), inputs_of(kind, 3)
    inside = [name for name, module in mixture.named_modules() if isinstance(module, MergedExperts)]
    assert len(routers(mixture)) == (4 if kind == "t5" else 2)
    assert len(inside) == len(routers(mixture)) * (3 if kind == "llama" else 2)
    assert not any("attention" in name.lower() or "attn" in name for name in inside)

    arithmetic = eu.state_dict(eu.merge("task_arithmetic", models.base, models.experts, scale=0.3))
    set_to(mixture, [0.3, 0.3])
    torch.testing.assert_close(mixture(inputs), filled(models.network, arithmetic)(inputs), rtol=0, atol=1e-9)
    for number, expert in enumerate(models.experts.values()):
        set_to(mixture, torch.eye(2)[number].tolist())
        own = {name: expert.read(name) if name.rpartition(".")[0] in inside else t for name, t in arithmetic.items()}
        torch.testing.assert_close(mixture(inputs), filled(models.network, own)(inputs), rtol=0, atol=1e-9)


PATCHES = r"(.*layer\.\d+|.*patch_embeddings)\..*"


@pytest.mark.parametrize(("method", "more"), [("wemoe", {}), ("e_wemoe", {"density": 1.0})])
def test_the_convolution_that_makes_patches_tokens_is_a_block_if_it_is_named(method, more):
    models, tasks = models_of("dinov2")
    parameters = SHORT | more | {"blocks": PATCHES}
    mixture, inputs = eu.fuse(method, models.network, models.experts, tasks=tasks, **parameters), inputs_of("dinov2", 3)
    convolution = mixture.model.embeddings.patch_embeddings.projection
    assert convolution.router.get_submodule("0").in_features == 3 * 4 * 4
    apart = convolution.choice(torch.cat([task.arrays("adapt").inputs[:1] for task in tasks]))
    assert (apart[0] - apart[1]).abs().max() > 1e-3  # the closed form saw the patches
    set_to(mixture, [0.0, 1.0])
    expert = models.experts["b"]
    inside = [name for name, module in mixture.named_modules() if isinstance(module, MergedExperts)]
    arithmetic = eu.state_dict(eu.merge("task_arithmetic", models.base, models.experts, scale=0.3))
    own = {name: expert.read(name) if name.rpartition(".")[0] in inside else t for name, t in arithmetic.items()}
    torch.testing.assert_close(mixture(inputs), filled(models.network, own)(inputs), rtol=0, atol=1e-9)
    torch.testing.assert_close(mixture(inputs)[1:2], mixture(inputs[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("hidden", [1, 2])
def test_an_output_does_not_depend_on_what_else_is_in_the_batch(hidden, monkeypatch):
    models, tasks = models_of("vit")
    mixture, inputs = spread(fused(models, tasks, hidden=hidden)), inputs_of("vit", 5)
    together = mixture(inputs)
    torch.testing.assert_close(together, torch.cat([mixture(one[None]) for one in inputs]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.flip(0), mixture(inputs.flip(0)), rtol=0, atol=1e-12)
    found = routers(mixture)[0](torch.stack([inputs_of("vit", 2, seed=i).flatten()[:16] for i in range(4)]))
    assert found.std(0).min() > 0.05  # samples are told apart
    monkeypatch.setattr(_products, "TILE", 100)
    torch.testing.assert_close(mixture(inputs), together, rtol=0, atol=1e-12)


def test_a_texts_output_does_not_depend_on_how_far_it_is_padded():
    from eutectic.bench.backbones import MeanPooled

    models, _ = models_of("bert")
    network = MeanPooled(copy.deepcopy(models.network.model))
    ids = torch.arange(1, 13).view(2, 6)
    ids[0, 3:] = 0
    models = ModelSet(network, base_of(network), experts_of(network))
    tasks = [Task(name, torch.nn.Identity(), adapt=Arrays(ids, torch.zeros(2, dtype=torch.long))) for name in models.experts]
    mixture = spread(fused(models, tasks))
    together = mixture(ids)
    torch.testing.assert_close(together[:1], mixture(ids[:1, :3]), rtol=0, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(mixture)(ids), together, rtol=0, atol=0)
    block = next(iter(gates(mixture).values())).shared
    block.padding.mask = None
    x = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block.padding.mean(x), x.mean(1))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 5), (4, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_matrices_is_the_sum_of_the_experts_outputs_with_its_gradient(shape, bias, monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    D, d = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64) if bias else None
    layer = _routing.routed(
        linear,
        {"": {"kind": "dense", "experts": 3, "block": "only"}},
        Memory({"deltas": D} | ({} if d is None else {"shift": d})),
    )
    shared = layer.shared
    x, c = torch.randn(*shape, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    shared.c = c
    expected = []
    for sample, own in zip(x, c.detach(), strict=True):
        weight = linear.weight.detach().clone()
        shift = torch.zeros(5, dtype=torch.float64) if d is None else linear.bias.detach().clone()
        for i in range(3):
            weight += own[i] * D[i]
            shift += 0 if d is None else own[i] * d[i]
        expected.append(sample @ weight.T + shift)
    for chunk in (1, 1 << 20):
        monkeypatch.setattr(_products, "TILE", chunk)
        found = layer(x)
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)
        G = torch.randn(found.shape, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(found, c, G)
        flat, out = x.reshape(4, -1, 6), G.reshape(4, -1, 5)
        each = [[(out[b] * (flat[b] @ D[i].T + (0 if d is None else d[i]))).sum() for i in range(3)] for b in range(4)]
        torch.testing.assert_close(gradient, torch.tensor(each, dtype=torch.float64))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight"] + ["bias"] * bias


@pytest.mark.parametrize("target", ["experts", "entropy"])
def test_only_routers_are_trained_and_what_they_are_fitted_to_falls(target):
    models, tasks = models_of("vit", torch.float32)
    before = eu.state_dict(models.base), [{k: t.clone() for k, t in eu.state_dict(e).items()} for e in models.experts.values()]
    mixture = fused(models, tasks, target=target, steps=40, batch_size=4, lr=1e-2, hidden=2, start="scale")
    history = mixture.artefact.about["history"]
    assert [step for step, *_ in history] == [0, 20, 40]
    assert history[-1][2] < 0.98 * history[0][2]
    arithmetic = eu.state_dict(eu.merge("task_arithmetic", models.base, models.experts, scale=0.3))
    state = mixture.state_dict()
    for name, tensor in models.network.state_dict().items():
        assert torch.equal(tensor, before[0][name]), name
        assert torch.equal(state[name], tensor if ".mlp." in name else arithmetic[name]), name
    for expert, kept in zip(models.experts.values(), before[1], strict=True):
        assert all(torch.equal(expert.read(name), tensor) for name, tensor in kept.items())
    trained = {key for key in mixture.artefact.tensors.specs}
    first = next(name for name in mixture.artefact.about["layers"])
    assert {f"{first}.router.{at}.{key}" for at in (0, 2) for key in ("weight", "bias")} < trained
    assert len(trained) == 8
    again = fused(models, tasks, target=target, steps=40, batch_size=4, lr=1e-2, hidden=2, start="scale")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in state.items())


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_routers_begin_at_the_scale_and_have_the_papers_size(hidden):
    router = _mixing.router_begun(400, 8, hidden, 0.3, 0, "block")
    size = {0: 8, 1: 8 * 400 + 8, 2: 400**2 + 400 + 8 * 400 + 8}[hidden]
    assert sum(p.numel() for p in router.parameters()) == size
    assert torch.equal(router[-1].bias, torch.full((8,), 0.3))
    x = torch.randn(5, 7, 400, generator=torch.Generator().manual_seed(0))
    assert router(x).shape == (5, 7, 8)
    for linear in (part for part in router if isinstance(part, nn.Linear)):
        assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    if hidden == 2:
        assert not router[0].bias.any()
    assert not torch.equal(
        _mixing.router_begun(400, 8, 1, 0.3, 1, "block")[0].weight, _mixing.router_begun(400, 8, 1, 0.3, 0, "block")[0].weight
    )


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_routers_begin_where_they_tell_the_tasks_apart(kind):
    models, tasks = models_of(kind)
    tasks = tasks_of(kind, models.network(inputs_of(kind, 1)).shape[1], n=40)
    begun = fused(models, tasks, hidden=1, lr=1e-12)
    known = Batches(Run(), tasks, 2)
    inputs = {task.name: known.inputs(task, known.learn[task.name]) for task in tasks}
    seen: dict[int, list[torch.Tensor]] = {}
    hooks = [
        g.register_forward_pre_hook(lambda m, args: seen.setdefault(id(m), []).append(args[0].mean(1)))
        for g in gates(begun).values()
    ]
    with torch.no_grad():
        for one in inputs.values():
            begun(one)
    for hook in hooks:
        hook.remove()
    wanted = torch.eye(2, dtype=torch.float64).repeat_interleave(30, 0)  # ten are held out
    for gate in gates(begun).values():
        features = torch.cat(seen[id(gate)])
        # the same regression, centred: the bias is free
        x, y = features - features.mean(0), wanted - wanted.mean(0)
        gram = features.T @ features
        solution = torch.linalg.solve(x.T @ x + _mixing.RIDGE * gram.diagonal().mean() * torch.eye(16).double(), x.T @ y)
        torch.testing.assert_close(gate.router[0].weight, solution.T, rtol=1e-5, atol=1e-8)
        c = gate.router(features)
        torch.testing.assert_close(c.mean(0), torch.tensor([0.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-8)
        assert (c * wanted).sum(1).mean() > (c * (1 - wanted)).sum(1).mean() + 0.05
    deep = fused(models, tasks, hidden=0)
    assert all(torch.allclose(gate.router[0].bias, torch.tensor(0.3).double(), atol=2e-3) for gate in gates(deep).values())


def test_the_network_is_the_base_and_each_experts_mlps_and_the_routers():
    models, tasks = models_of("vit")
    mixture = fused(models, tasks, hidden=2)
    count = sum(p.numel() for p in models.network.parameters())
    inside = sum(p.numel() for name, p in models.network.named_parameters() if ".mlp." in name)
    assert sum(p.numel() for p in mixture.parameters()) == count + 2 * inside + 2 * (16**2 + 16 + 2 * 16 + 2)


def test_an_artefact_of_routers_is_kept_and_applied_again_and_a_mixture_can_be_copied(tmp_path):
    models, tasks = models_of("bert", torch.float32)
    mixture, inputs = fused(models, tasks, steps=2, lr=0.1), inputs_of("bert", 4)
    expected = mixture(inputs)
    _api.save_artefact(mixture.artefact, tmp_path / "artefact")
    loaded = _api.load_artefact(tmp_path / "artefact")
    again = _api.applied(copy.deepcopy(models.network), models.base, models.experts, loaded)
    assert torch.equal(again(inputs), expected)
    copied = copy.deepcopy(mixture)  # though coefficients with a graph are left in it
    assert torch.equal(copied(inputs), expected)
    set_to(mixture, [0.0, 1.0])
    assert torch.equal(copied(inputs), expected)
    layers = dict(loaded.about["layers"])
    other = loaded._replace(about=dict(loaded.about) | {"layers": layers | {"x": {}}})
    with pytest.raises(CheckpointError, match="no tensor 'x.weight'"):
        _api.applied(copy.deepcopy(models.network), models.base, models.experts, other)
    broken = loaded._replace(about=dict(loaded.about) | {"layers": {name: {"kind": "odd"} for name in layers}})
    with pytest.raises(LayoutError, match="no routed layer is described by"):
        _api.applied(copy.deepcopy(models.network), models.base, models.experts, broken)


def test_blocks_are_found_by_name_too_and_refused_with_what_there_is():
    models, tasks = models_of("awkward", torch.float32)
    with pytest.raises(LayoutError, match="no linear layer is called like .* there are first, twin, again, frozen"):
        fused(models, tasks)
    mixture = fused(models, tasks, blocks="(fir|fro).*")
    assert mixture.first.router is not None
    assert mixture.frozen.router is not None
    assert type(mixture.twin) is nn.Linear
    with pytest.raises(ParameterError, match="no regular expression"):
        fused(models, tasks, blocks="(")
    with pytest.raises(ParameterError, match="tells one block from another"):
        fused(models, tasks, blocks=".*")
    same = {
        name: Memory(eu.state_dict(e) | {f"first.{k}": models.base.read(f"first.{k}") for k in ("weight", "bias")})
        for name, e in models.experts.items()
    }
    with pytest.raises(LayoutError, match="no expert differs"):
        fused(models._replace(experts=same), tasks, blocks="(first)")
    with pytest.raises(ParameterError, match="hidden"):
        fused(models, tasks, hidden=3)
    block = fused(models, tasks, blocks="()(?:first|frozen)")
    with pytest.raises(LayoutError, match="other samples than its first"):
        block.frozen(torch.zeros(3, 5))


def test_the_suites_own_transformer_is_routed():
    from eutectic.bench.vit import ViT

    torch.manual_seed(0)
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    network = ViT(config | {"layer_norm_eps": 1e-6}).double().eval()
    models = ModelSet(network, base_of(network), experts_of(network))
    mixture = fused(models, tasks_of("vit", 16, n=8))
    blocks = {about["block"] for about in mixture.artefact.about["layers"].values()}
    assert blocks == {"encoder.layer.0", "encoder.layer.1"}
    assert sum(isinstance(module, MergedExperts) for module in mixture.modules()) == 4
    assert mixture(inputs_of("vit", 2)).shape == (2, 16)


@pytest.mark.parametrize(
    ("losses", "expected", "asked"),
    [
        ([3.0, 2.0, 2.5], 1.5, 3),
        ([3.0, 3.0], 1.0, 2),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 3.0, 5),
        ([float("nan")], 1.0, 1),
        ([float("inf")], 1.0, 1),
        ([3.0, float("nan")], 1.0, 2),
    ],
)
def test_routers_begin_as_strong_as_what_they_are_fitted_to_wants(losses, expected, asked):
    models, tasks = models_of("vit")
    mixture = spread(fused(models, tasks, hidden=2))
    before = [{name: p.clone() for name, p in router.named_parameters()} for router in routers(mixture)]
    seen = []

    def criterion():
        seen.append(routers(mixture)[0][-1].bias.clone())
        return losses[len(seen) - 1]

    _mixing.strengthen(mixture, criterion)
    assert len(seen) == asked
    assert torch.equal(seen[-1], _mixing.STRENGTHS[asked - 1] * before[0]["2.bias"])
    for router, plain in zip(routers(mixture), before, strict=True):
        for name, parameter in router.named_parameters():
            assert torch.equal(parameter, (expected if name.startswith("2.") else 1) * plain[name])


@pytest.mark.parametrize(
    ("target", "start", "asked"), [("experts", "tasks", 1), ("entropy", "tasks", 0), ("experts", "scale", 0)]
)
def test_only_the_experts_outputs_say_how_strong_routers_begin(target, start, asked, monkeypatch):
    models, tasks = models_of("vit")
    seen = []

    def set_to_seven(network, criterion):
        seen.append(criterion())
        for gate in gates(network).values():
            gate.router[-1].bias.data.fill_(7.0)

    monkeypatch.setattr(_mixing, "strengthen", set_to_seven)
    mixture = fused(models, tasks, target=target, start=start, steps=1, lr=1e-12)
    assert len(seen) == asked
    assert all(torch.isfinite(torch.tensor(seen)))
    assert all(bool(((router[-1].bias - 7).abs() < 1e-6).all()) == bool(asked) for router in routers(mixture))


def test_a_router_that_looks_at_nothing_is_not_strengthened():
    models, tasks = models_of("vit")
    _mixing.strengthen(fused(models, tasks, hidden=0), lambda: pytest.fail("there is nothing to choose"))


def test_layers_without_entries_are_no_part_of_a_block():
    network = nn.Module()
    network.mlp = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    network.mlp[1].weight = nn.Parameter(torch.empty(0, 3))
    network.other_mlp = nn.Conv2d(3, 8, 1)
    assert [list(block) for block in _mixing.blocks_of(network, _mixing.MLP).values()] == [["mlp.0"]]
    assert [list(block) for block in _mixing.blocks_of(network, r"(.*)", patches=True).values()] == [["mlp.0"], ["other_mlp"]]
