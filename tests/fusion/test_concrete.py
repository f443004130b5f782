"""The Concrete mask, and what the two methods do with it."""

import copy

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, network_of, tasks_of
from torch import nn
from torch.func import functional_call

from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError
from eutectic.fusion import _api
from eutectic.fusion._concrete import ConcreteMask, exported, fit_mask, logit_gradient, rescaled, sampled
from eutectic.fusion._fit import Batches, backward, generator
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._losses import entropy
from eutectic.fusion._weighted import Weighted
from eutectic.merge.api import merge, state_dict
from eutectic.task import Arrays, Task

DOUBLE = torch.float64


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


# ── the distribution ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24, 0.5])
def test_samples_are_finite_and_strictly_between_0_and_1_whatever_the_noise(u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, generator, dtype: torch.full(shape, u, dtype=dtype))
    m = sampled(torch.zeros(4), 1.0, noise())
    assert ((m > 0) & (m < 1)).all()


def test_a_cold_sample_is_hard_and_as_often_1_as_sigmoid_says():
    x = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=DOUBLE).repeat_interleave(20_000)
    m = sampled(x, 1e-4, noise()).view(5, -1)
    assert ((m < 1e-3) | (m > 1 - 1e-3)).double().mean() > 0.999
    warm = sampled(x, 0.5, noise()).view(5, -1)
    for found in (m, warm):
        share, p = (found > 0.5).double().mean(1), torch.sigmoid(x.view(5, -1)[:, 0])
        assert ((share - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()


def test_a_seed_repeats_and_another_does_not():
    x = torch.zeros(100)
    assert torch.equal(sampled(x, 0.5, noise(1)), sampled(x, 0.5, noise(1)))
    assert not torch.equal(sampled(x, 0.5, noise(1)), sampled(x, 0.5, noise(2)))


@pytest.mark.parametrize("how", ["mean", "hard", "sample"])
def test_rescaled_masks_have_mean_1(how):
    x = torch.randn(500, generator=noise(), dtype=DOUBLE)
    (mask,) = exported([x], how, 0.5, 0)
    assert mask.mean().item() == pytest.approx(1, abs=1e-12)
    assert torch.equal(exported([x], how, 0.5, 0)[0], mask)
    assert torch.equal(exported([x], how, 0.5, 1)[0], mask) == (how != "sample")
    kept = {"mean": torch.sigmoid(x), "hard": (x > 0).double(), "sample": sampled(x, 0.5, generator(0, "export"))}[how]
    torch.testing.assert_close(mask, kept / kept.mean(), rtol=1e-12, atol=0)


def test_gradient_of_the_logits_is_that_of_finite_differences_and_of_autograd():
    a, x = torch.randn(2, 30, generator=noise(), dtype=DOUBLE)

    def scaled(x):
        u = torch.rand(30, generator=noise(7), dtype=DOUBLE)
        m = torch.sigmoid((x + torch.logit(u)) / 0.5)
        return m / m.mean()

    wanted = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(scaled, wanted)
    (expected,) = torch.autograd.grad((a * scaled(wanted)).sum(), wanted)
    mask, mean = rescaled(sampled(x, 0.5, noise(7)))
    torch.testing.assert_close(logit_gradient(a.clone(), mask, mean, 0.5), expected, rtol=1e-10, atol=1e-14)
    e = 1e-6
    for j in (0, 11, 29):
        step = torch.zeros(30, dtype=DOUBLE).index_fill_(0, torch.tensor([j]), e)
        slope = ((a * scaled(x + step)).sum() - (a * scaled(x - step)).sum()) / (2 * e)
        assert slope.item() == pytest.approx(expected[j].item(), rel=1e-6, abs=1e-9)


def test_a_mask_that_keeps_nearly_nothing_is_not_scaled_beyond_a_thousand():
    x = torch.full((20,), -9.0, dtype=DOUBLE)
    wanted = x.clone().requires_grad_()
    m = torch.sigmoid((wanted + torch.logit(torch.rand(20, generator=noise(3), dtype=DOUBLE))) / 0.5)
    assert m.mean() < 1e-3
    (expected,) = torch.autograd.grad((m / 1e-3).sum(), wanted)
    mask, mean = rescaled(sampled(x, 0.5, noise(3)))
    assert mask.max() <= 1000
    found = logit_gradient(torch.ones(20, dtype=DOUBLE), mask, mean, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


# ── masks on a network ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def setting():
    network, width = network_of("awkward")
    base, experts = base_of(network), experts_of(network)
    return network, base, experts, tasks_of("awkward", width)


def weights_of(equation, value=0.3):
    return torch.full(equation.shape, value, dtype=DOUBLE)


def trained(network):
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}


def test_logits_far_up_give_the_merge_and_far_down_the_base(setting):
    network, base, experts, _ = setting
    equation = Weighted(network, base, experts)
    equation.write(weights_of(equation))
    whole = trained(network)
    mask = ConcreteMask(equation, 0.5, 0)
    for x in mask.logits.values():
        x.fill_(50)
    for masks in (mask.sample("any"), exported(list(mask.logits.values()), "hard", 0.5, 0)):
        equation.write(weights_of(equation), masks)
        torch.testing.assert_close(trained(network), whole, rtol=1e-12, atol=1e-14)
    assert mask.density() == {"all": 1.0, "least": 1.0, "most": 1.0}
    for x in mask.logits.values():
        x.fill_(-50)
    for how in ("hard", "mean"):
        equation.write(weights_of(equation), exported(list(mask.logits.values()), how, 0.5, 0))
        for name, tensor in trained(network).items():
            torch.testing.assert_close(tensor, base.read(name), rtol=0, atol=1e-12)
    assert mask.density() == {"all": 0.0, "least": 0.0, "most": 0.0}


def test_one_sample_serves_all_experts_and_masking_their_sum_is_masking_each(setting):
    network, base, experts, _ = setting
    equation = Weighted(network, base, experts)
    masks = ConcreteMask(equation, 0.5, 0).sample("draw")
    weights = torch.randn(equation.shape, generator=noise(), dtype=DOUBLE)
    alone = []
    for k, expert in enumerate(experts.values()):
        unit = torch.zeros(equation.shape, dtype=DOUBLE)
        unit[k] = 1
        equation.write(unit, masks)
        parts = trained(network)
        for site, mask in zip(equation.sites, masks, strict=True):
            start, moved = base.read(site.name), expert.read(site.name)
            ratio = (parts[site.name] - start) / (moved - start)
            torch.testing.assert_close(ratio.reshape(-1), mask, rtol=1e-8, atol=1e-8)
        alone.append(parts)
    equation.write(weights, masks)
    for at, site in enumerate(equation.sites):
        start = base.read(site.name)
        explicit = start + sum(weights[k, at] * (parts[site.name] - start) for k, parts in enumerate(alone))
        torch.testing.assert_close(network.state_dict()[site.name], explicit, rtol=1e-10, atol=1e-13)


def test_samples_are_seeded_by_their_key(setting):
    network, base, experts, _ = setting
    equation = Weighted(network, base, experts)
    first, second = ConcreteMask(equation, 0.5, 0), ConcreteMask(equation, 0.5, 1)
    drawn = torch.cat(first.sample(3, "outer"))
    assert torch.equal(torch.cat(first.sample(3, "outer")), drawn)
    for other in (first.sample(4, "outer"), first.sample(3, "inner"), second.sample(3, "outer")):
        assert not torch.equal(torch.cat(other), drawn)


def test_nothing_to_mask_is_refused(setting):
    network, base, _, _ = setting
    with pytest.raises(LayoutError, match="no expert differs"):
        ConcreteMask(Weighted(network, base, {"a": base, "b": base}), 0.5, 0)


# ── learning a mask ───────────────────────────────────────────────────────────────────────────────────────────────────


class Watched(Weighted):
    """Notes the weights of every merge."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.written = []

    def write(self, weights_KL, mask=None):
        self.written.append((weights_KL.clone(), None if mask is None else torch.cat(list(mask))))
        super().write(weights_KL, mask)


@pytest.mark.parametrize("per", ["tensor", "task"])
def test_each_outer_step_starts_anew_from_the_same_weights_and_differentiates_at_what_the_inner_step_made(setting, per):
    network, base, experts, tasks = setting
    run = Run(seed=5)
    equation = Watched(network, base, experts)
    mask, start = ConcreteMask(equation, 0.5, run.seed), weights_of(equation)
    batches = Batches(run, tasks, 4)
    found = fit_mask(mask, start, batches, entropy, run, steps=3, lr=0.05, inner_lr=0.1, patience=5, per=per)
    assert torch.equal(start, weights_of(equation))
    inner, outer = equation.written[1:7:2], equation.written[2:8:2]  # the first is the first look's
    assert len(equation.written) == 1 + 3 * 2 + 1
    for (before, first), (after, second) in zip(inner, outer, strict=True):
        assert torch.equal(before, start)  # back to λ₀, whatever the steps before did
        assert not torch.equal(first, second)  # a sample of its own
        # Adam's first step has no momentum: every coefficient moves by η, against its slope
        torch.testing.assert_close((after - start).abs(), torch.full_like(start, 0.1), rtol=1e-12, atol=1e-14)
        if per == "task":
            assert torch.equal(after, after[:, :1].expand_as(after))
    assert found.history[0][0] == 0
    assert found.history[-1][0] == 3


def test_the_outer_gradient_takes_the_weights_as_constants(setting, monkeypatch):
    network, base, experts, tasks = setting
    run = Run(seed=5)
    equation = Watched(network, base, experts)
    mask, batches = ConcreteMask(equation, 0.5, run.seed), Batches(run, tasks, 4)
    taken = []

    def kept(*arguments):
        found = ConcreteMask.gradient(mask, *arguments)
        taken.append({name: x.clone() for name, x in found.items()})  # the next write takes their place
        return found

    monkeypatch.setattr(mask, "gradient", kept)
    fit_mask(mask, weights_of(equation), batches, entropy, run, steps=1, lr=1e-9, inner_lr=0.1, patience=5)
    (_, (start, _), (adapted, _), _) = equation.written  # a look, the inner step, the outer step, a look
    assert not torch.equal(start, adapted)

    logits = {name: torch.zeros_like(x, requires_grad=True) for name, x in mask.logits.items()}
    draws, thetas = generator(run.seed, 0, "outer"), {}
    for at, (site, x) in enumerate(zip(equation.sites, logits.values(), strict=True)):
        m = torch.sigmoid((x + torch.logit(torch.rand(x.shape, generator=draws, dtype=DOUBLE))) / 0.5)
        origin = base.read(site.name)
        change = sum(adapted[k, at] * (expert.read(site.name) - origin) for k, expert in enumerate(experts.values()))
        thetas[site.name] = origin + (m / m.mean()).view(origin.shape) * change
    loss = 0.0
    for task in tasks:  # the inner step has taken batch 0
        inputs = batches.inputs(task, batches.index(task, 1))
        loss = loss + entropy(task, task.head(functional_call(network, thetas, (inputs,))), torch.empty(0))
    for name, expected in zip(logits, torch.autograd.grad(loss, list(logits.values())), strict=True):
        torch.testing.assert_close(taken[0][name], expected, rtol=1e-8, atol=1e-12)


def test_phase_one_changes_only_logits_and_phase_two_only_coefficients(setting):
    network, base, experts, tasks = setting
    models = ModelSet(network, base, experts)
    common = {"mask_steps": 4, "mask_lr": 0.1, "lr": 0.05, "batch_size": 4}
    short, long = (_api.fit("concrete_adamerging", models, tasks, common | {"steps": n}, Run()) for n in (1, 9))
    for name in short.tensors.specs:
        equal = torch.equal(short.tensors.read(name), long.tensors.read(name))
        assert equal == name.startswith("mask."), name
    start = 0.3
    moved = (short.tensors.read("weights") - start).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-3, atol=1e-6)  # one of Adam's, from λ₀

    arithmetic = _api.fit("concrete_task_arithmetic", models, tasks, {"steps": 4, "lr": 0.1, "batch_size": 4}, Run())
    assert all(name.startswith("mask.") for name in arithmetic.tensors.specs)
    masked = state_dict(_api.fused(base, experts, arithmetic))
    closed = state_dict(merge("task_arithmetic", base, experts))
    changed = 0
    for name, tensor in masked.items():
        if f"mask.{name}" in arithmetic.tensors.specs:
            factor = arithmetic.tensors.read(f"mask.{name}").double().view(tensor.shape)
            expected = base.read(name) + factor * (closed[name] - base.read(name))
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-13)
            changed += int((factor != 1).sum())
        elif name != "again.weight":
            assert torch.equal(tensor, closed[name]), name
    assert changed
    assert torch.equal(masked["again.weight"], masked["twin.weight"])


class Point(nn.Module):
    """Its weights are its output, whatever the input."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, dtype=DOUBLE))

    def forward(self, x):
        return self.weight.expand(len(x), -1)


def test_where_two_experts_conflict_the_mask_closes_and_the_loss_falls_below_task_arithmetic():
    # each expert has weights of its own that are right, and both are wrong where they meet
    n = 16
    mine = {"a": slice(0, 6), "b": slice(6, 12)}
    conflict = slice(12, 16)
    experts, base = {}, base_of(Point(n))
    for sign, (name, part) in zip((1.0, 3.0), mine.items(), strict=True):
        vector = torch.zeros(n, dtype=DOUBLE)
        vector[part], vector[conflict] = 1.0, 4 * sign
        experts[name] = Memory({"weight": vector})

    wanted = torch.ones(n, dtype=DOUBLE).index_fill_(0, torch.arange(12, 16), -1.0)

    def quadratic(task, logits, index):
        error = (logits - wanted).square().mean(0)
        return error[mine[task.name]].sum() + error[conflict].sum()

    samples = Arrays(torch.zeros(16, 1, dtype=DOUBLE), torch.zeros(16, dtype=torch.long))
    tasks = [Task(name, lambda features: features, adapt=samples) for name in mine]
    network, run = Point(n), Run()
    equation = Weighted(network, base, experts)
    mask, weights = ConcreteMask(equation, 0.5, 0), weights_of(equation, 0.75)
    batches = Batches(run, tasks, 4)

    def loss(masks=None):
        equation.write(weights, masks)
        value = backward(network, batches, 0, quadratic, run)
        equation.write(weights, masks)
        return value

    found = fit_mask(mask, weights, batches, quadratic, run, steps=200, lr=0.1, inner_lr=0.0, patience=100)
    (logits,) = found.tensors.values()
    assert logits[conflict].max() < 0 < logits[:12].min()
    hard, mean, plain = loss(exported([logits], "hard", 0.5, 0)), loss(exported([logits], "mean", 0.5, 0)), loss()
    assert mean < 0.2 * plain
    assert hard < 0.2 * plain


def test_the_network_that_was_given_is_the_only_thing_that_fitting_writes_to(setting):
    network, base, experts, tasks = setting
    before = {key: copy.deepcopy(state_dict(model)) for key, model in {"base": base, **experts}.items()}
    for name in ("concrete_task_arithmetic", "concrete_adamerging"):
        _api.fit(name, ModelSet(network, base, experts), tasks, {"steps": 2, "batch_size": 4}, Run())
    for key, model in {"base": base, **experts}.items():
        for tensor in model.specs:
            assert torch.equal(model.read(tensor), before[key][tensor])
