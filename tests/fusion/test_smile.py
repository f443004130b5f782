"""SMILE against loops over tokens and experts, and the laws of its layers; no data anywhere."""

import copy
import itertools
import json
import math

import pytest
import safetensors.torch
import torch
from tests.fusion.networks import base_of, experts_of, inputs_of, network_of
from torch import nn

import eutectic as eu
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.lora import open_lora
from eutectic.errors import CheckpointError, LayoutError, NonFiniteError, ParameterError
from eutectic.fusion import _api, _lowrank, _routed, _routing
from eutectic.fusion._routed import LowRankExperts

FULL = 99


def mlp(dtype=torch.float64, widths=(6, 8, 5), bias=True):
    torch.manual_seed(0)
    first, *rest = (nn.Linear(a, b, bias) for a, b in itertools.pairwise(widths))
    return nn.Sequential(first, *(part for layer in rest for part in (nn.Tanh(), layer))).to(dtype)


def fused(network, experts, **parameters):
    return eu.fuse("smile", network, experts, tasks=[], **({"gate_rank": 2, "rank": 3} | parameters))


def x(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(network, weights):
    network = copy.deepcopy(network)
    network.load_state_dict(eu.state_dict(weights))
    return network


def only_linears(network, experts):
    """The experts with the base's everything but linear layers."""
    linear = {f"{path}.{key}" for path in _routing.linears(network) for key in ("weight", "bias")}
    base = network.state_dict()
    return {n: Memory({k: t if k in linear else base[k] for k, t in eu.state_dict(e).items()}) for n, e in experts.items()}


def forced(monkeypatch, expert):
    def one_hot(scores, top):
        found = torch.zeros_like(scores)
        found[..., expert] = 1
        return found

    monkeypatch.setattr(_routed, "coefficients", one_hot)


def naive(token, W0, b0, Ws, bs, rank, gate_rank, top):
    """The paper's equations, for one token."""
    scores, outputs = [], []
    for W, b in zip(Ws, bs, strict=True):
        U, S, Vh = torch.linalg.svd(W - W0, full_matrices=False)
        scores.append(math.sqrt(sum(float(Vh[j] @ token) ** 2 for j in range(min(gate_rank, len(S))))))
        low = sum(S[j] * (Vh[j] @ token) * U[:, j] for j in range(min(rank, len(S))))
        outputs.append(low + b - b0)
    total = sum(math.exp(score) for score in scores)
    p = [math.exp(score) / total for score in scores]
    best = sorted(range(len(p)), key=lambda i: -p[i])[:top]
    return W0 @ token + b0 + sum(p[i] / sum(p[j] for j in best) * outputs[i] for i in best)


@pytest.mark.parametrize(("top", "many"), [(1, 0), (1, FULL), (2, 0), (3, 0), (9, 0)])
@pytest.mark.parametrize(("rank", "gate_rank"), [(1, 1), (3, 2), (2, 4), (FULL, 3)])
def test_it_is_the_papers_equations_token_by_token(rank, gate_rank, top, many, monkeypatch):
    monkeypatch.setattr(_routed, "MANY", many)
    network = mlp()
    experts = experts_of(network, ("a", "b", "c"), noise=1)
    tokens, expected = x(7, 6), []
    for token in tokens:
        for at in (0, 2):
            states = [eu.state_dict(weights) for weights in experts.values()]
            Ws, bs = ([state[f"{at}.{key}"] for state in states] for key in ("weight", "bias"))
            layer = network[at]
            token = naive(token, layer.weight.detach(), layer.bias.detach(), Ws, bs, rank, gate_rank, top)
            token = torch.tanh(token) if at == 0 else token
        expected.append(token)
    found = fused(network, experts, rank=rank, gate_rank=gate_rank, top_k=top)
    torch.testing.assert_close(found(tokens), torch.stack(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(found(tokens[:6].view(2, 3, 6)).flatten(0, 1), found(tokens[:6]))  # tokens, not samples
    torch.testing.assert_close(found(tokens[0]), found(tokens)[0])
    assert found[0].top == min(top, 3)


@pytest.mark.parametrize("kind", ["mlp", "vit", "llama"])
@pytest.mark.parametrize("expert", [0, 1])
def test_at_full_rank_and_sent_to_one_expert_it_is_that_expert(kind, expert, monkeypatch):
    network = mlp() if kind == "mlp" else network_of(kind)[0]
    inputs = x(4, 6) if kind == "mlp" else inputs_of(kind, 4)
    experts = only_linears(network, experts_of(network))
    mixture = fused(network, experts, rank=FULL)
    forced(monkeypatch, expert)
    own = filled(network, list(experts.values())[expert])(inputs)
    torch.testing.assert_close(mixture(inputs), own, rtol=0, atol=1e-8)
    assert (own - network(inputs)).abs().max() > 0.05


def test_gpt2s_transposed_weights_are_routed_too(monkeypatch):
    network, _ = network_of("gpt2")
    base = eu.state_dict(base_of(network))
    experts = {
        name: Memory(base | {key: t for key, t in eu.state_dict(weights).items() if ".h." in key and t.ndim == 2})
        for name, weights in experts_of(network).items()
    }
    mixture, inputs = fused(network, experts, rank=FULL), inputs_of("gpt2", 3)
    assert len(mixture.artefact.about["layers"]) == 8
    for expert, weights in enumerate(experts.values()):
        forced(monkeypatch, expert)
        torch.testing.assert_close(mixture(inputs), filled(network, weights)(inputs), rtol=0, atol=1e-8)


def test_a_convolution_of_windows_side_by_side_has_experts_and_no_other_has():
    torch.manual_seed(0)
    for stride, padding, routed in ((2, 0, True), (1, 0, False), (2, 1, False)):
        network = nn.Sequential(nn.Conv2d(3, 4, 2, stride, padding), nn.Flatten(), nn.LazyLinear(2)).double().eval()
        images = torch.randn(5, 3, 7, 6, dtype=torch.float64)  # of seven rows the last is in no window
        network(images)
        (expert,) = experts_of(network, ("a",)).values()
        mixture = eu.fuse("smile", network, {"a": expert, "b": expert}, tasks=[], rank=99)
        assert isinstance(mixture[0], LowRankExperts) == routed
        start = {key: tensor for key, tensor in network.state_dict().items() if key.startswith("0.")}
        both = eu.state_dict(expert) | ({} if routed else start)
        torch.testing.assert_close(mixture(images), torch.func.functional_call(network, both, images), rtol=0, atol=1e-6)


def test_what_is_cut_off_is_what_the_smaller_singular_values_hold():
    network = mlp(widths=(12, 10))
    experts = experts_of(network, ("a",), noise=1)
    delta = experts["a"].read("0.weight") - network[0].weight.detach()
    s, tokens = torch.linalg.svdvals(delta), x(9, 12)
    own, errors = filled(network, experts["a"])(tokens), []
    for rank in range(1, 11):
        mixture = fused(network, experts, rank=rank)  # of one expert: its gate is open to every token
        layer = mixture[0]
        cut = delta - layer.left[:, 0] @ layer.right[0, :rank]
        errors.append(float(cut.norm()))
        assert errors[-1] == pytest.approx(float(s[rank:].norm()), abs=1e-6)
        assert ((mixture(tokens) - own).norm(dim=1) <= (s[rank] if rank < 10 else 0) * tokens.norm(dim=1) + 1e-6).all()
    assert errors == sorted(errors, reverse=True)


def test_coefficients_are_of_the_best_and_sum_to_one():
    scores = x(50, 4).abs()
    for top in (1, 2, 4):
        c = _routed.coefficients(scores, top)
        assert ((c > 0).sum(-1) == top).all()
        torch.testing.assert_close(c.sum(-1), torch.ones(50, dtype=torch.float64))
        assert torch.equal(c.argmax(-1), scores.argmax(-1))
    assert set(_routed.coefficients(scores, 1).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(_routed.coefficients(scores, 4), scores.softmax(-1))


def layer_of(linear, right, left, gate, top):
    """A routed layer with these factors."""
    experts, directions, _ = right.shape
    sizes = {"kind": "low_rank", "experts": experts, "directions": directions, "rank": left.shape[2], "gate": gate, "top": top}
    shift = torch.zeros(experts, linear.out_features).to(left)
    return _routing.routed(linear, {"": sizes}, Memory({"right": right, "left": left, "shift": shift}))


def chosen(layer, tokens):
    """What each token's coefficients are, through a left factor that writes them out."""
    spy = copy.deepcopy(layer)
    experts = len(layer.right)
    spy.weight, spy.bias = nn.Parameter(torch.zeros(experts, layer.in_features).to(layer.weight)), None
    spy.left, spy.shift = (
        nn.Parameter(torch.zeros(experts, experts, 1).to(layer.weight)),
        nn.Parameter(torch.eye(experts).to(layer.weight)),
    )
    return spy(tokens)


def test_a_token_on_one_experts_directions_chooses_it_however_long_it_is_and_however_they_are_turned():
    basis = torch.linalg.qr(x(8, 8))[0].T
    right = basis[:6].view(3, 2, 8)
    layer = layer_of(nn.Linear(8, 5, dtype=torch.float64), right, x(5, 3, 2), 2, 1)
    tokens = torch.cat([x(4, 2, seed=i) @ right[i] for i in range(3)])
    expected = torch.eye(3, dtype=torch.float64).repeat_interleave(4, 0)
    assert torch.equal(chosen(layer, tokens), expected)
    assert torch.equal(chosen(layer, 1e-3 * tokens), expected)
    mixed, turn = x(40, 8), torch.linalg.qr(x(2, 2))[0]
    turned = layer_of(nn.Linear(8, 5, dtype=torch.float64), -turn @ right, x(5, 3, 2), 2, 1)
    assert torch.equal(chosen(layer, mixed), chosen(turned, mixed))
    assert len(chosen(layer, mixed).argmax(1).unique()) == 3


def test_a_layer_of_which_only_biases_changed_takes_their_mean_and_one_that_none_changed_stays():
    network = mlp(widths=(6, 8, 5, 4))
    base, experts = eu.state_dict(base_of(network)), {}
    for name, weights in experts_of(network, ("a", "b", "c")).items():
        state = eu.state_dict(weights)
        experts[name] = Memory(base | {"0.bias": state["0.bias"]} | {k: state[k] for k in ("4.weight", "4.bias")})
    mixture = fused(network, experts)
    sizes = mixture.artefact.about["layers"]
    assert list(sizes) == ["0", "4"]
    assert (sizes["0"]["rank"], sizes["0"]["directions"]) == (0, 0)
    assert type(mixture[2]) is nn.Linear
    shift = torch.stack([e.read("0.bias") for e in experts.values()]).mean(0) - base["0.bias"]
    torch.testing.assert_close(mixture[0](x(3, 6)), network[0](x(3, 6)) + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_of_low_rank_is_held_in_that_rank_without_loss(dtype):
    network = mlp(torch.float32, widths=(24, 20))
    base, experts = eu.state_dict(base_of(network)), {}
    for at, name in enumerate("ab"):
        update = x(20, 2 + at, seed=at, dtype=torch.float32) @ x(2 + at, 24, seed=9 + at, dtype=torch.float32)
        experts[name] = Memory(base | {"0.weight": base["0.weight"] + update})
    network, experts = (
        network.to(dtype),
        {n: Memory({k: t.to(dtype) for k, t in eu.state_dict(e).items()}) for n, e in experts.items()},
    )
    mixture = fused(network, experts, rank=16, gate_rank=8)
    assert mixture[0].right.shape == (2, 16, 24)
    assert mixture[0].left.shape == (20, 2, 16)
    if dtype == torch.float32:  # in half precision what the expert was rounded to has every direction
        assert [int(right.any(dim=1).sum()) for right in mixture[0].right] == [2, 3]
    layer = mixture[0]
    for at, expert in enumerate(experts.values()):
        delta = expert.read("0.weight").float() - network[0].weight.detach().float()
        product = layer.left[:, at].float() @ layer.right[at, : layer.left.shape[2]].float()
        assert (product - delta).norm() < (1e-5 if dtype == torch.float32 else 0.02) * delta.norm()
    assert mixture(x(3, 24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("rank", "gate_rank"), [(32, 16), (8, 16), (128, 1)])
def test_a_layer_grows_as_the_formula_says(rank, gate_rank):
    shapes = 12 * (4 * [(768, 768)] + [(3072, 768), (768, 3072)])  # CLIP-ViT-B/32, eight experts
    grown = 0
    for m, n in shapes:
        linear = nn.Linear(n, m, device="meta")
        layer = LowRankExperts(linear, 8, max(rank, gate_rank), rank, gate_rank, 1)
        grown += sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in linear.parameters())
    papers = 96 * (6912 * gate_rank + 13824 * rank + 6912)
    assert grown == papers - 96 * 6912 * min(rank, gate_rank)  # that the gate has no product of its own
    network = mlp()
    experts = experts_of(network)
    mixture = fused(network, experts)
    held = sum(p.numel() for p in mixture.parameters()) - sum(p.numel() for p in network.parameters())
    assert held == sum(2 * (3 * n + 3 * m + m) for m, n in ((8, 6), (5, 8)))
    saved = _api.fused(base_of(network), experts, mixture.artefact)
    assert held == sum(spec.numel for spec in saved.specs.values()) - sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", ["vit", "t5", "awkward"])
@pytest.mark.parametrize("many", [0, FULL])
def test_an_output_does_not_depend_on_what_else_is_in_the_batch(kind, many, monkeypatch):
    monkeypatch.setattr(_routed, "MANY", many)
    network, _ = network_of(kind)
    mixture, inputs = fused(network, experts_of(network), rank=2), inputs_of(kind, 6)
    together = mixture(inputs)
    torch.testing.assert_close(together, torch.cat([mixture(one[None]) for one in inputs]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.flip(0), mixture(inputs.flip(0)), rtol=0, atol=1e-12)
    assert (together - network(inputs)).abs().max() > 0.05


def test_many_tokens_go_through_one_expert_after_the_other_with_the_same_gradients(monkeypatch):
    network = mlp(widths=(6, 8))
    mixture = fused(network, experts_of(network, ("a", "b", "c"), noise=1))
    assert len(set(mixture[0].choice(x(40, 6)).argmax(-1).tolist())) == 3
    found = []
    for many in (0, FULL):
        monkeypatch.setattr(_routed, "MANY", many)
        inputs = x(40, 6).requires_grad_()
        y = mixture(inputs)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [inputs, mixture[0].weight, mixture[0].bias])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_many_tokens_choose_as_few_do_in_a_tie_and_under_autocast_too(monkeypatch):
    network = mlp(torch.float32, widths=(6, 8))
    mixture = fused(network, experts_of(network, ("a", "b", "c"), noise=1))
    tokens, found = torch.cat([torch.zeros(4, 6), x(36, 6, dtype=torch.float32)]), []
    for many in (0, FULL):
        monkeypatch.setattr(_routed, "MANY", many)
        with torch.no_grad():
            found.append(mixture(tokens))
            with torch.autocast("cpu", torch.bfloat16):
                assert mixture(tokens).dtype == torch.bfloat16
    torch.testing.assert_close(found[0], found[1])


def test_no_model_is_changed_and_the_mixture_shares_nothing():
    network, _ = network_of("awkward", torch.float32)
    network.train()
    experts = {name: filled(network, weights) for name, weights in experts_of(network).items()}
    models = [network, *experts.values()]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    mixture = fused(network, experts)
    assert not mixture.training
    assert not any(module.training for module in mixture.modules())
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert network.training
    assert [p.requires_grad for p in network.parameters()] == [
        k != "frozen.weight" and k != "frozen.bias" for k, _ in network.named_parameters()
    ]


def test_what_is_no_linear_layer_is_the_bases_or_the_average():
    network, _ = network_of("awkward", torch.float32)
    experts = experts_of(network)
    kept, averaged = (fused(network, experts, rest=rest).state_dict() for rest in ("base", "average"))
    for key, tensor in network.state_dict().items():
        assert torch.equal(kept[key], tensor), key
        mean = torch.stack([e.read(key).double() for e in experts.values()]).mean(0)
        routed = key.split(".")[0] in ("first", "twin", "again", "frozen")
        torch.testing.assert_close(averaged[key].double(), tensor.double() if routed else mean, rtol=0, atol=1e-6)


def test_layers_used_twice_and_a_network_that_is_one_layer():
    layer = nn.Linear(5, 5)
    network = nn.ModuleDict({"a": nn.Sequential(layer, nn.Tanh(), layer), "b": layer})
    mixture = fused(network, experts_of(network))
    assert mixture["a"][0] is mixture["a"][2] is mixture["b"]
    assert isinstance(mixture["b"], LowRankExperts)
    assert list(mixture.artefact.about["layers"]) == ["a.0"]
    alone = fused(layer, experts_of(layer))
    assert isinstance(alone, LowRankExperts)
    assert alone.artefact.about["method"] == "smile"


def test_an_artefact_is_kept_and_applied_again(tmp_path):
    network = mlp(torch.float32)
    experts = experts_of(network)
    mixture = fused(network, experts)
    _api.save_artefact(mixture.artefact, tmp_path / "artefact")
    loaded = _api.load_artefact(tmp_path / "artefact")
    again = _api.applied(copy.deepcopy(network), base_of(network), experts, loaded)
    assert torch.equal(again(x(4, 6, dtype=torch.float32)), mixture(x(4, 6, dtype=torch.float32)))
    with pytest.raises(CheckpointError, match="is not the base"):
        _api.applied(copy.deepcopy(network), experts["a"], experts, loaded)


def test_what_a_matrix_has_not_is_not_asked_of_it_and_the_artefact_says_so():
    network = mlp()
    experts = experts_of(network)
    mixture = fused(network, experts, rank=FULL, gate_rank=FULL)
    sizes = mixture.artefact.about["layers"]["0"]
    assert {key: sizes[key] for key in ("rank", "directions", "gate")} == {"rank": 6, "directions": 6, "gate": 5}
    tokens = x(60, 6)  # over all six directions of its inputs a token is equally long for both
    assert len(chosen(mixture[0], tokens).argmax(1).unique()) == 2


def test_an_expert_that_equals_the_base_is_never_chosen():
    network = mlp()
    mixture = fused(network, {"same": base_of(network)} | experts_of(network))
    assert not chosen(mixture[0], x(60, 6))[:, 0].any()
    assert not mixture[0].left[:, 0].any()


def test_experts_that_are_adapters_are_held_in_their_rank_and_no_dense_matrix_is_decomposed(tmp_path, monkeypatch):
    network = mlp(torch.float32)
    base, experts = base_of(network), {}
    for at, name in enumerate("ab"):
        tensors = {}
        for layer in ("0", "2"):
            m, n = base.spec(f"{layer}.weight").shape
            tensors[f"base_model.model.{layer}.lora_A.weight"] = x(2, n, seed=at, dtype=torch.float32)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = x(m, 2, seed=at + 5, dtype=torch.float32)
        folder = tmp_path / name
        folder.mkdir()
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        experts[name] = open_lora(folder, base)
    whole = {name: Memory(eu.state_dict(expert)) for name, expert in experts.items()}
    expected = fused(network, whole, rank=4, gate_rank=1)

    def refuse(*_):
        raise AssertionError("decomposed a dense matrix")

    monkeypatch.setattr(_lowrank, "sketched", refuse)
    mixture = fused(network, experts, rank=4, gate_rank=1)
    assert mixture[0].left.shape == (8, 2, 2)
    tokens = x(20, 6, dtype=torch.float32)
    torch.testing.assert_close(mixture(tokens), expected(tokens), rtol=0, atol=1e-4)


def test_what_cannot_be_kept_is_refused_by_name():
    network = mlp()
    experts = experts_of(network)
    with pytest.raises(LayoutError, match="no expert differs .* 2 linear layers"):
        fused(network, {"a": network, "b": network})
    with pytest.raises(LayoutError, match="no experts"):
        fused(network, {})
    sick = Memory(eu.state_dict(experts["b"]) | {"2.bias": torch.full((5,), torch.nan, dtype=torch.float64)}, "<sick>")
    with pytest.raises(NonFiniteError, match=r"'b' \(<sick>\).*'2\.bias'"):
        fused(network, experts | {"b": sick})
    layer = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    with pytest.raises(LayoutError, match=r"0 is a torch\.nn\.TransformerEncoderLayer"):
        fused(layer, experts_of(layer))
    with pytest.raises(ParameterError, match="rest"):
        fused(network, experts, rest="sum")
