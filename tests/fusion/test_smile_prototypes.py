"""SMILE by prototypes: the decision against a Gaussian's, the mixture against loops, and what it is for."""

import copy
import itertools
import math

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, head_of, inputs_of, network_of, tasks_of
from torch import nn

import eutectic as eu
from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError, ParameterError, TaskError
from eutectic.fusion import smile_prototypes
from eutectic.fusion._routed import LowRankOfSample
from eutectic.fusion._routing import Discriminant, gates
from eutectic.fusion.smile_prototypes import SHRINKAGE, discriminant
from eutectic.task import Arrays, Task

FULL, WIDTHS = 99, (6, 8, 7, 5)


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp():
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(WIDTHS)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def tasks_at(places, n=40):
    """A task for each place, about which its inputs lie, unlabelled but for zeros."""
    found = []
    for number, (name, place) in enumerate(places.items()):
        adapt = Arrays(drawn(n, WIDTHS[0], seed=number) + place, torch.zeros(n, dtype=torch.long))
        found.append(Task(name, head_of(WIDTHS[-1], 3), adapt=adapt, test=adapt))
    return found


def fused(network, experts, tasks, **parameters):
    return eu.fuse("smile_prototypes", network, experts, tasks=tasks, **({"rank": FULL} | parameters))


# ── the decision ──────────────────────────────────────────────────────────────────────────────────────────────────────


def log_posterior(x, learn, temperature):
    """Gauss's, for one sample, from the definition."""
    means = [sum(rows) / len(rows) for rows in learn]
    d = len(x)
    covariance = torch.zeros(d, d, dtype=torch.float64)
    for rows, mean in zip(learn, means, strict=True):
        for row in rows:
            covariance += torch.outer(row - mean, row - mean)
    covariance /= sum(len(rows) for rows in learn)
    size = sum(float(covariance[i, i]) for i in range(d)) / d
    inverse = torch.inverse((1 - SHRINKAGE) * covariance + SHRINKAGE * size * torch.eye(d, dtype=torch.float64))
    odds = [-float((x - mean) @ inverse @ (x - mean)) / 2 / temperature for mean in means]
    return [value - math.log(sum(math.exp(other) for other in odds)) for value in odds]


def test_the_router_gives_a_gaussians_posterior_at_some_temperature():
    features = [drawn(20, 4, seed=i) + torch.eye(4, dtype=torch.float64)[i] for i in range(3)]
    W, b = discriminant(features)
    learn = [[row for at, row in enumerate(x) if at % 4 != 3] for x in features]
    some = drawn(6, 4, seed=9)
    found = (some @ W.T + b).log_softmax(1)
    fitting = [
        t
        for t in 2 ** torch.arange(0, 8, 0.5)
        if all(torch.allclose(found[i], torch.tensor(log_posterior(x, learn, float(t))).double()) for i, x in enumerate(some))
    ]
    assert len(fitting) == 1


def test_it_is_certain_of_what_lies_apart_and_of_nothing_where_all_lie_together():
    apart = [drawn(80, 4, seed=i) + 9 * torch.eye(4, dtype=torch.float64)[i] for i in range(3)]
    W, b = discriminant(apart)
    for i, x in enumerate(apart):
        assert (x @ W.T + b).softmax(1)[:, i].min() > 0.99
    together = [drawn(80, 40, seed=i) for i in range(3)]  # as many numbers as would tell apart what was learned from
    W, b = discriminant(together)
    assert (drawn(50, 40, seed=9) @ W.T + b).softmax(1).max() < 0.6
    assert all(torch.isfinite(part).all() for part in discriminant([x[:2] for x in apart]))
    assert all(torch.isfinite(part).all() for part in discriminant([torch.ones(8, 4).double()] * 2))


# ── the mixture ───────────────────────────────────────────────────────────────────────────────────────────────────────


def blend(x, states, c, layers):
    """x through layers whose weights are Σᵢ cᵢ θᵢ."""
    for at in layers:
        weight, bias = (sum(c[i] * state[f"{at}.{key}"] for i, state in enumerate(states)) for key in ("weight", "bias"))
        x = torch.tanh(weight @ x + bias)
    return x


def decision(mixture, after, x):
    """c of the input x of the layer that decides."""
    W, b = (mixture.artefact.tensors.read(f"{2 * after}.router.{key}") for key in ("weight", "bias"))
    phi = torch.cat([x, x.abs()])
    odds = [float(W[i] @ phi + b[i]) for i in range(len(b))]
    return [math.exp(value) / sum(math.exp(other) for other in odds) for value in odds]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_it_is_the_average_before_the_decision_and_the_weighted_experts_after_it_or_from_the_start(after, ahead):
    network = mlp()
    experts = experts_of(network, ("a", "b", "c"), noise=0.5)
    mixture = fused(network, experts, tasks_at({"a": 1.0, "b": 0.0, "c": -1.0}), after=after, ahead=ahead)
    states, layers, expected = [eu.state_dict(weights) for weights in experts.values()], (0, 2, 4), []
    inputs = drawn(7, 6)
    for x in inputs:
        before = blend(x, [eu.state_dict(base_of(network))] if ahead else states, [1] if ahead else [1 / 3] * 3, layers[:after])
        c = decision(mixture, after, before)
        expected.append(blend(x if ahead else before, states, c, layers if ahead else layers[after:]))
    torch.testing.assert_close(mixture(inputs), torch.stack(expected), rtol=0, atol=1e-6)
    assert list(gates(mixture)) == [str(2 * after)]
    assert sum(isinstance(module, LowRankOfSample) for module in mixture.modules()) == (3 if ahead else 3 - after)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_after_a_look_ahead_every_matrix_and_the_patches_are_the_weighted_experts(kind):
    network, width = network_of(kind)
    experts, inputs = experts_of(network), inputs_of(kind, 4)
    mixture = fused(network, experts, tasks_of(kind, width), ahead=True)
    together, (gate,) = mixture(inputs), gates(mixture).values()
    states = [eu.state_dict(weights) for weights in experts.values()]
    convolved = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert all(isinstance(mixture.get_submodule(name), LowRankOfSample) for name in convolved)
    assert bool(convolved) == (kind == "vit")
    layers = {name for name, module in mixture.named_modules() if isinstance(module, LowRankOfSample)}
    for x, c, y in zip(inputs, gate.shared.c.detach(), together, strict=True):
        weights = {}
        for name in network.state_dict():
            share = c if name.rpartition(".")[0] in layers else torch.full_like(c, 1 / len(c))
            weights[name] = sum(float(w) * state[name] for w, state in zip(share, states, strict=True))
        torch.testing.assert_close(torch.func.functional_call(network, weights, (x[None],))[0], y, rtol=0, atol=1e-5)


def test_a_look_ahead_ends_whatever_happens_and_fills_no_cache():
    transformers = pytest.importorskip("transformers")
    network, width = network_of("gpt2")
    mixture = fused(network, experts_of(network), tasks_of("gpt2", width), rank=2, ahead=True)
    ids = inputs_of("gpt2", 3)
    expected = mixture(ids)
    with pytest.raises(RuntimeError, match="indices"):
        mixture(ids.float())
    assert torch.equal(mixture(ids), expected)
    with pytest.raises(LayoutError, match="use_cache=False"):
        mixture(ids, past_key_values=transformers.DynamicCache())


def test_what_the_router_was_fitted_to_is_the_input_of_its_layer_in_the_average():
    network = mlp()
    experts, tasks = experts_of(network, noise=0.5), tasks_at({"a": 1.0, "b": -1.0})
    mixture = fused(network, experts, tasks)
    mean = [torch.stack([e.read(f"0.{key}") for e in experts.values()]).mean(0) for key in ("weight", "bias")]
    features = []
    for task in tasks:
        chosen = smile_prototypes.chosen(task, 256, smile_prototypes.Run())
        features.append(Discriminant.features(torch.tanh(task.arrays("adapt").inputs[chosen] @ mean[0].T + mean[1])))
    for key, expected in zip(("weight", "bias"), discriminant(features), strict=True):
        torch.testing.assert_close(mixture.artefact.tensors.read(f"2.router.{key}"), expected, rtol=0, atol=1e-6)


def test_each_tasks_inputs_choose_its_expert_though_all_experts_read_the_same_directions():
    network = mlp()
    base, experts = eu.state_dict(base_of(network)), {}
    for number, name in enumerate("abc"):
        change = {
            f"{at}.weight": drawn(WIDTHS[i + 1], 2, seed=number) @ drawn(2, WIDTHS[i], seed=50 + i)
            for i, at in enumerate((0, 2, 4))
        }
        experts[name] = Memory({key: tensor + change.get(key, 0) for key, tensor in base.items()})
    tasks = tasks_at({"a": 4.0, "b": 0.0, "c": -4.0})
    mixture = fused(network, experts, tasks, rank=2, after=0)
    right = mixture[0].right  # the papers' gate is the length on these
    torch.testing.assert_close(right[0].T @ right[0], right[1].T @ right[1], rtol=0, atol=1e-6)
    for number, task in enumerate(tasks):
        c = mixture[0].choice(task.arrays("test").inputs)
        assert c[:, number].mean() > 0.95


@pytest.mark.parametrize("kind", ["vit", "bert", "t5", "gpt2"])
def test_an_output_does_not_depend_on_what_else_is_in_the_batch(kind):
    network, width = network_of(kind)
    mixture, inputs = fused(network, experts_of(network), tasks_of(kind, width), rank=2), inputs_of(kind, 6)
    together = mixture(inputs)
    torch.testing.assert_close(together, torch.cat([mixture(one[None]) for one in inputs]), rtol=0, atol=1e-12)
    assert (together - network(inputs)).abs().max() > 0.05
    assert len(gates(mixture)) == 1
    assert torch.equal(copy.deepcopy(mixture)(inputs), together)


def test_labels_are_not_looked_at_and_a_fit_repeats_itself():
    network = mlp()
    experts, tasks = experts_of(network), tasks_at({"a": 1.0, "b": -1.0})
    first = fused(network, experts, tasks, samples=20)
    for task in tasks:
        task.arrays("adapt").labels.fill_(2)
    again = fused(network, experts, tasks, samples=20)
    other = fused(network, experts, tasks, samples=20, seed=1)
    assert torch.equal(first(drawn(5, 6)), again(drawn(5, 6)))
    assert not torch.equal(first(drawn(5, 6)), other(drawn(5, 6)))


def test_what_cannot_be_decided_is_refused_by_name():
    network = mlp()
    experts, tasks = experts_of(network), tasks_at({"a": 1.0, "b": -1.0})
    with pytest.raises(ParameterError, match="after = 3: experts differ in 3 blocks"):
        fused(network, experts, tasks, after=3)
    with pytest.raises(TaskError, match="expert 'b' has no task of its name"):
        fused(network, experts, tasks[:1])
    with pytest.raises(LayoutError, match="no expert differs"):
        fused(network, {"a": network, "b": network}, tasks)
    mixture = fused(network, experts, tasks)
    with pytest.raises(LayoutError, match="got other samples than its first"):
        mixture[4](drawn(3, 7))
