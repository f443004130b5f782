"""Linearised adapters: layer by layer, and the tangent of the whole network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eutectic.bench.vit import ViT
from eutectic.checkpoint.base import Memory, live
from eutectic.checkpoint.lora import open_lora
from eutectic.merge.api import state_dict
from eutectic.tuning.lora import adapters, attach, save_adapter
from eutectic.tuning.tangent import Tangent, tangent_at, tangent_of_adapters

CONFIG = {
    **{"hidden_size": 12, "layer_norm_eps": 1e-6, "patch_size": 2, "image_size": 4},
    **{"num_attention_heads": 2, "mlp_ratio": 2, "num_hidden_layers": 2},
}


def network():
    torch.manual_seed(0)
    found = ViT(CONFIG, "mean").double().eval()
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return found


def images(n=5):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def moved(model, seed, size=0.3, of="B"):
    """The adapters somewhere else than where they began."""
    generator = torch.Generator().manual_seed(seed)
    for _, adapter in adapters(model):
        for name in of:
            p = getattr(adapter, name)
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


class Published(nn.Module):
    """A layer as the authors' code has it: its value at what it began with, and a product with its Jacobian there."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.start = layer, {name: p.detach().clone() for name, p in layer.named_parameters()}

    def forward(self, x):
        step = {name: p - self.start[name] for name, p in self.layer.named_parameters()}
        call = lambda p: torch.func.functional_call(self.layer, p, (x,))  # noqa: E731
        return sum(torch.func.jvp(call, (self.start,), (step,)))


def published(model):
    """Every adapted layer linearised as the authors do, with A free to move."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LoraLinear":
                child.A.requires_grad_(True)
                parent.add_module(name, Published(child))
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # PyTorch's own
def test_layer_by_layer_it_is_lora_with_a_frozen():
    """Values, gradients and ten steps of descent are the same, and A's gradient is exactly 0."""
    ours, theirs = network(), network()
    attach(ours, 2, 4, seed=0, frozen_a=True)
    attach(theirs, 2, 4, seed=0)
    theirs = published(theirs)
    target = torch.randn(5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0) for m in (ours, theirs)]
    for _ in range(10):
        for model, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            F.mse_loss(model(images()), target).backward()
            optimiser.step()
        free = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            other = free[name.replace(".A", ".layer.A").replace(".B", ".layer.B")] if name[-2:] in (".A", ".B") else None
            if name.endswith(".A"):
                assert not other.grad.any()
                assert torch.equal(p, other)
            elif name.endswith(".B"):
                torch.testing.assert_close(p, other)
                assert p.any()
    torch.testing.assert_close(ours(images()), theirs(images()))
    moved(ours, 3)
    layer = dict(adapters(ours))["encoder.layer.1.mlp.fc1"]
    x = torch.randn(7, 12, dtype=torch.float64)
    frozen = layer(x)
    reference = Published(copy.deepcopy(layer))
    reference.start["B"] = torch.zeros_like(layer.B)
    with torch.no_grad():
        reference.layer.A.add_(torch.randn_like(layer.A))  # whatever A does
    torch.testing.assert_close(reference(x), frozen)


def weights(model, base):
    """W + s B A of every adapted layer: the network that an adapter is folded into."""
    state = state_dict(base)
    for name, adapter in adapters(model):
        state[f"{name}.weight"] += adapter.scaling * adapter.B.detach() @ adapter.A.detach()
    return state


def attached(seed, at, frozen_a=True):
    model = network()
    attach(model, 2, 4, seed=at, frozen_a=frozen_a)
    return moved(model, seed, of="B" if frozen_a else "AB")


@pytest.mark.parametrize(("frozen_a", "at", "same"), [(True, (0, 0), True), (False, (0, 0), False), (True, (0, 1), False)])
def test_merging_factors_is_merging_weights_if_a_is_shared_and_frozen(frozen_a, at, same):
    """Else the factors' sum differs by exactly the cross terms s Σ λᵢλⱼ Bᵢ Aⱼ less what is lost of s Σ λᵢ Bᵢ Aᵢ."""
    one, two = attached(1, at[0], frozen_a), attached(2, at[1], frozen_a)
    for (name, a), (_, b) in zip(adapters(one), adapters(two), strict=True):
        folded = a.scaling * (0.4 * a.B @ a.A + 0.6 * b.B @ b.A)
        by_factor = a.scaling * (0.4 * a.B + 0.6 * b.B) @ (0.4 * a.A + 0.6 * b.A)
        assert torch.allclose(by_factor, folded) is same, name
        gap = a.scaling * 0.24 * (a.B - b.B) @ (a.A - b.A)
        torch.testing.assert_close(folded - by_factor, gap)


def test_the_tangent_touches_the_network_and_errs_by_squares():
    model = network()
    attach(model, 2, 4, seed=0)
    moved(model, 1, 0.05, "AB")  # around B₀ ≠ 0, where A counts too
    tangent, x = tangent_of_adapters(model), images()
    torch.testing.assert_close(tangent(x), model(x))
    errors = []
    for size in (0.04, 0.02, 0.01):
        before = copy.deepcopy(tangent)
        moved(before.network, 2, size, "AB")
        errors.append((before(x) - before.network(x)).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_tangent_adds_what_task_vectors_do():
    model = network()
    attach(model, 2, 4, seed=0, frozen_a=True)
    start, x = copy.deepcopy(tangent_of_adapters(model)), images()

    def change(*steps):
        there = copy.deepcopy(start)
        for seed, size in steps:
            moved(there.network, seed, size)
        return there(x) - start(x)

    torch.testing.assert_close(change((1, 0.4), (2, 0.8)), change((1, 0.4)) + change((2, 0.8)))
    torch.testing.assert_close(change((1, 0.8)), 2 * change((1, 0.4)))
    layer_by_layer = moved(copy.deepcopy(start.network), 1, 0.4)
    assert not torch.allclose(layer_by_layer(x) - start(x), change((1, 0.4)), rtol=0.01)  # what is between layers is not linear


def test_the_tangent_of_an_adapter_is_that_of_its_weights_and_needs_no_a():
    """So θ₀ and A₀, B say all of an expert: A has no derivative where B is 0."""
    free = network()
    attach(free, 2, 4, seed=0)
    around = tangent_of_adapters(free)
    assert sum(name.endswith(".A") for name in around._names) == len(dict(adapters(free)))
    moved(free, 1, of="BA")
    frozen = tangent_of_adapters(network_with_frozen_a())
    moved(frozen.network, 1)
    base = network()
    with torch.no_grad():
        for (_, a), (_, b) in zip(adapters(free), adapters(frozen.network), strict=True):
            a.B.copy_(b.B)
    torch.testing.assert_close(around(images()), frozen(images()))
    dense = network()
    dense.load_state_dict(weights(frozen.network, live(base)))
    torch.testing.assert_close(tangent_at(dense, base.state_dict())(images()), frozen(images()))
    assert list(tangent_at(dense, base.state_dict()).state_dict()) == list(base.state_dict())


def network_with_frozen_a():
    model = network()
    attach(model, 2, 4, seed=0, frozen_a=True)
    return model


def test_only_named_parameters_are_expanded():
    model, x = network(), images()
    name = "layernorm.bias"
    tangent = Tangent(model, {name: model.get_parameter(name)})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    torch.testing.assert_close(tangent(x), model(x))  # it is linear in the last bias, and follows the others


@pytest.mark.parametrize("rslora", [False, True])
def test_linearised_adapters_survive_their_folder(tmp_path, rslora):
    model = network().float()
    attach(model, 3, 6, seed=0, frozen_a=True, rslora=rslora)
    moved(model, 1)
    save_adapter(model, tmp_path, "../base", torch.float32)
    expert = network().float()
    expert.load_state_dict(state_dict(open_lora(tmp_path, Memory(network().float().state_dict()))))
    torch.testing.assert_close(expert(images().float()), model(images().float()))
    assert next(iter(adapters(model)))[1].scaling == pytest.approx(6 / (3**0.5 if rslora else 3))
