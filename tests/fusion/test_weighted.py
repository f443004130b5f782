"""The equation and its gradients, against autograd through an explicit merge in float64."""

import pytest
import torch
from tests.fusion.networks import TRANSFORMERS, base_of, experts_of, network_of, tasks_of
from torch.func import functional_call

from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError, NonFiniteError
from eutectic.fusion import _weighted
from eutectic.fusion._coefficients import facts, weighted
from eutectic.fusion._concrete import ConcreteMask
from eutectic.fusion._fit import Batches, backward, generator
from eutectic.fusion._fusion import Artefact, Run
from eutectic.fusion._losses import entropy
from eutectic.fusion._weighted import Weighted
from eutectic.merge.api import merge, state_dict

TEMPERATURE, SEED = 0.5, 3
RUN = Run(seed=SEED)


def merged(equation, base, experts, weights, masks=None):
    """θ of every site by its definition, as a graph over ``weights`` and ``masks``."""
    found = {}
    for at, site in enumerate(equation.sites):
        start = base.read(site.name)
        change = sum(weights[k, at] * (expert.read(site.name) - start) for k, expert in enumerate(experts.values()))
        found[site.name] = start + (change if masks is None else masks[at].view(start.shape) * change)
    return found


def loss_through(network, thetas, batches):
    """Σ over tasks of the entropy at step 0, through a functional call of the network."""
    total = 0.0
    for task in batches.tasks:
        inputs = batches.inputs(task, batches.index(task, 0))
        total = total + entropy(task, task.head(functional_call(network, thetas, (inputs,))), torch.empty(0))
    return total


def masks_through(logits, key):
    """m̂ by its definition, at the noise of one draw."""
    noise, found = generator(SEED, *key), []
    for x in logits:
        u = torch.rand(x.shape, generator=noise, dtype=x.dtype).clamp(1e-6, 1 - 1e-6)
        m = torch.sigmoid((x + torch.log(u) - torch.log(1 - u)) / TEMPERATURE)
        found.append(m / m.mean())
    return found


def close(found, expected):
    size = max(float(expected.abs().max()), 1e-6)  # what is 0, such as the gradient of a bias of keys, is rounding
    assert float((found.double() - expected.double()).abs().max()) <= 1e-9 * size


@pytest.mark.parametrize("kind", ["awkward", *TRANSFORMERS])
def test_gradients_are_those_of_autograd_through_the_merge(kind):
    network, width = network_of(kind)
    base, experts = base_of(network), experts_of(network)
    batches = Batches(RUN, tasks_of(kind, width), 4)
    equation = Weighted(network, base, experts)
    assert {name for site in equation.sites for name in (site.name, *site.aliases)} == {
        name for name, tensor in network.state_dict(keep_vars=True).items() if tensor.requires_grad
    }
    weights = torch.randn(equation.shape, generator=generator("weights"), dtype=torch.float64).requires_grad_()

    plain = loss_through(network, merged(equation, base, experts, weights), batches)
    equation.write(weights.detach())
    assert backward(network, batches, 0, entropy, RUN) == pytest.approx(plain.item(), rel=1e-12)
    close(equation.weight_gradient(), torch.autograd.grad(plain, weights)[0])

    mask = ConcreteMask(equation, TEMPERATURE, SEED)
    for x in mask.logits.values():
        x.copy_(torch.randn(x.shape, generator=generator("logits", x.numel()), dtype=x.dtype))
    logits = [x.clone().requires_grad_() for x in mask.logits.values()]
    scaled = masks_through(logits, ("draw",))
    whole = loss_through(network, merged(equation, base, experts, weights, scaled), batches)
    by_weight, *by_logit = torch.autograd.grad(whole, [weights, *logits], materialize_grads=True)

    drawn = mask.sample("draw")
    equation.write(weights.detach(), drawn)
    assert backward(network, batches, 0, entropy, RUN) == pytest.approx(whole.item(), rel=1e-12)
    close(equation.weight_gradient(drawn), by_weight)
    for found, expected in zip(mask.gradient(weights.detach(), drawn).values(), by_logit, strict=True):
        close(found, expected)


def test_chunks_do_not_show(monkeypatch):
    network, width = network_of("awkward")
    base, experts = base_of(network), experts_of(network)
    batches = Batches(RUN, tasks_of("awkward", width), 4)
    found = []
    for chunk in (1 << 16, 7):
        monkeypatch.setattr(_weighted, "CHUNK", chunk)
        equation = Weighted(network, base, experts)
        weights = torch.randn(equation.shape, generator=generator("weights"), dtype=torch.float64)
        mask = ConcreteMask(equation, TEMPERATURE, SEED)
        drawn = mask.sample("draw")
        equation.write(weights, drawn)
        backward(network, batches, 0, entropy, RUN)
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        found.append((state, equation.weight_gradient(drawn), mask.gradient(weights, drawn)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_convolutions_in_channels_last_are_written_and_differentiated():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).double().to(memory_format=torch.channels_last)
    base, experts = base_of(network), experts_of(network)
    equation = Weighted(network, base, experts)
    weights = torch.tensor([[0.5, 1.0], [-0.25, 2.0]], dtype=torch.float64).requires_grad_()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = functional_call(network, merged(equation, base, experts, weights), (x,)).square().sum()
    equation.write(weights.detach())
    found = network(x).square().sum()
    found.backward()
    close(found.detach(), expected.detach())
    close(equation.weight_gradient(), torch.autograd.grad(expected, weights)[0])
    drawn = ConcreteMask(equation, TEMPERATURE, SEED).sample("draw")
    equation.write(weights.detach(), drawn)
    network(x).square().sum().backward()
    rows = [g.clone() for g in equation.mask_gradient(weights.detach())]
    masks = [m.clone().requires_grad_() for m in drawn]
    whole = functional_call(network, merged(equation, base, experts, weights.detach(), masks), (x,)).square().sum()
    for row, want in zip(rows, torch.autograd.grad(whole, masks), strict=True):
        close(row, want)


def naive(base, experts, coefficients):
    return {
        name: base.read(name)
        + sum(c * (expert.read(name) - base.read(name)) for c, expert in zip(coefficients, experts.values(), strict=True))
        for name, spec in base.specs.items()
        if spec.dtype.is_floating_point
    }


@pytest.mark.parametrize(
    "coefficients",
    [(1 / 3, 1 / 3, 1 / 3), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.3, 0.3, 0.3)],
    ids=["mean", "one", "none", "0.3"],
)
def test_special_coefficients_give_average_expert_base_and_task_arithmetic(coefficients):
    network, _ = network_of("awkward")
    trained = {name for name, tensor in network.state_dict(keep_vars=True).items() if tensor.requires_grad}
    base, experts = base_of(network), experts_of(network, "abc")
    before = {key: state_dict(model) for key, model in {"base": base, **experts}.items()}
    equation = Weighted(network, base, experts)
    weights = torch.tensor(coefficients, dtype=torch.float64)[:, None].expand(equation.shape)
    equation.write(weights)
    artefact = Artefact(Memory({"weights": weights}), facts(equation, "task_arithmetic", None))
    streamed = state_dict(weighted(base, experts, artefact))
    expected, mean = naive(base, experts, coefficients), naive(base, experts, [1 / 3] * 3)
    for found in (network.state_dict(), streamed):
        for name, tensor in found.items():
            if tensor.dtype.is_floating_point:
                torch.testing.assert_close(tensor, (expected if name in trained else mean)[name], rtol=1e-12, atol=1e-14)
    assert torch.equal(streamed["positions"], base.read("positions"))
    if len(set(coefficients)) == 1 and coefficients[0]:
        closed = state_dict(merge("task_arithmetic", base, experts, scale=coefficients[0]))
        for name in trained:
            torch.testing.assert_close(streamed[name], closed[name], rtol=1e-12, atol=1e-14)

    owned = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    for key, model in {"base": base, **experts}.items():
        for name in model.specs:
            assert torch.equal(model.read(name), before[key][name]), f"{key}: {name} was changed"
            assert model.read(name).untyped_storage().data_ptr() not in owned
            assert streamed[name].untyped_storage().data_ptr() != model.read(name).untyped_storage().data_ptr()


def test_tensors_that_no_expert_changed_are_no_sites_and_fixed_ones_follow_their_weights():
    network, _ = network_of("awkward")
    base, experts = base_of(network), experts_of(network)
    same = {name: Memory(state_dict(expert) | {"first.bias": base.read("first.bias")}) for name, expert in experts.items()}
    equation = Weighted(network, base, same, fixed=[0.25, 2.0])
    assert "first.bias" not in {site.name for site in equation.sites}
    assert sorted(equation.fixed) == ["frozen.bias", "frozen.weight", "norm.running_mean", "norm.running_var", "shift"]
    expected = naive(base, experts, [0.25, 2.0])
    for name in equation.fixed:
        torch.testing.assert_close(network.state_dict()[name], expected[name], rtol=1e-12, atol=1e-14)


def test_task_vectors_of_float32_are_kept_in_half_and_sums_are_not():
    network, _ = network_of("awkward", torch.float32)
    base, experts = base_of(network), experts_of(network)
    equation = Weighted(network, base, experts)
    assert {site.vectors.of(slice(0, 1)).dtype for site in equation.sites} == {torch.bfloat16}
    equation.write(torch.full(equation.shape, 0.3, dtype=torch.float64))
    expected = naive(base, experts, [0.3, 0.3])
    for site in equation.sites:
        error = (network.state_dict()[site.name] - expected[site.name]).abs().max()
        assert 0 < error < 0.6 * 2**-8 * 0.5  # λ Σ |τ| ≤ 0.6 · 0.5, each rounded to 8 bits


def test_broken_inputs_are_named():
    network, _ = network_of("awkward")
    base, experts = base_of(network), experts_of(network)
    broken = state_dict(experts["b"])
    broken["norm.weight"][1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'b' \(<broken>\).*'norm.weight'"):
        Weighted(network, base, experts | {"b": Memory(broken, "<broken>")})
    lacking = {name: tensor for name, tensor in state_dict(base).items() if name != "norm.weight"}
    with pytest.raises(LayoutError, match=r"'norm.weight'.*<lacking>"):
        Weighted(network, Memory(lacking, "<lacking>"), experts)
