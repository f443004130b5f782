"""NuSLERP, Multi-SLERP and the Karcher mean against loops over whole vectors in float64, and against geometry."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracle import naive

from eutectic.errors import LayoutError, ParameterError
from eutectic.merge.api import merge, state_dict


def one(method, vectors, **parameters):
    """The merge of vectors of float64."""
    experts = [{"w": torch.as_tensor(v, dtype=torch.float64)} for v in vectors]
    return state_dict(merge(method, {"w": torch.zeros_like(experts[0]["w"])}, experts, **parameters))["w"]


def on_circle(*angles):
    return [torch.tensor([math.cos(a), math.sin(a), 0.0], dtype=torch.float64) for a in angles]


# ── the equations, on the vectors themselves ──────────────────────────────────────────────────────────────────────────


def log_map(u, x):
    cos = max(-1.0, min(1.0, float(u @ x)))
    angle = 2 * math.atan2(float((u - x).norm()), float((u + x).norm()))
    across = x - cos * u
    return across * (angle / float(across.norm())) if float(across.norm()) > 1e-9 else torch.zeros_like(u)


def exp_map(u, v):
    size = float(v.norm())
    return math.cos(size) * u + (math.sin(size) / size if size > 0 else 1.0) * v


def spherical(tensors, weights, steps):
    flat = [t.double().reshape(-1) for t in tensors]
    weights = [w / sum(weights) for w in weights]
    norm = sum(w * float(x.norm()) for w, x in zip(weights, flat, strict=True))
    some = [(w, x / x.norm()) for w, x in zip(weights, flat, strict=True) if float(x.norm()) > 0]
    u = sum((w * x for w, x in some), torch.zeros_like(flat[0]))
    if float(u.norm()) < 1e-6:
        return sum(w * x for w, x in zip(weights, flat, strict=True)).view(tensors[0].shape)
    u = u / u.norm()
    mass = sum(w for w, _ in some)
    for _ in range(steps):
        u = exp_map(u, sum(w / mass * log_map(u, x) for w, x in some))
        u = u / u.norm()
    return (norm * u).view(tensors[0].shape)


def of_models(models, weights, steps):
    weights = weights or [1.0] * len(models)
    return {name: spherical([m[name] for m in models], weights, steps) for name in models[0]}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("related", [True, False], ids=["fine-tunes", "strangers"])
@pytest.mark.parametrize(("method", "steps"), [("multislerp", 1), ("karcher", 60)])
def test_equal_weights(method, steps, related, k, assert_close):
    base = naive.random_model(0)
    models = naive.fine_tunes(base, k) if related else [naive.random_model(i, grid=i == 1, scale=1 + i) for i in range(k)]
    assert_close(state_dict(merge(method, None, models)), of_models(models, None, steps), 2e-6)


@pytest.mark.parametrize("weights", [[1, 1, 2], [0, 3, 1], [0.2, 0.3, 0.1]])
@pytest.mark.parametrize(("method", "steps"), [("multislerp", 1), ("karcher", 60)])
def test_weights(method, steps, weights, assert_close):
    models = naive.fine_tunes(naive.random_model(0), 3)
    found = state_dict(merge(method, None, models, weights=weights))
    assert_close(found, of_models(models, weights, steps), 2e-6)


@pytest.mark.parametrize("weights", [None, [1, 2, 5]])
def test_multislerp_of_task_vectors(weights, assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 3)  # the last one's tensor b is a zero task vector
    delta = of_models(naive.task_vectors(base, experts), weights, 1)
    wanted = {name: base[name].double() + delta[name] for name in base}
    assert_close(state_dict(merge("multislerp_delta", base, experts, weights=weights)), wanted, 2e-6)


@pytest.mark.parametrize("weights", [None, [1, 3], [0, 2], [-1, 3]])
@pytest.mark.parametrize("method", [f"nuslerp{along}{of}" for along in ("", "_rows", "_columns") for of in ("", "_delta")])
def test_nuslerp(method, weights, assert_close):
    base = naive.random_model(0)
    experts = naive.fine_tunes(base, 2)
    on_deltas = method.endswith("_delta")
    first, second = naive.task_vectors(base, experts) if on_deltas else experts
    t = 0.5 if weights is None else weights[1] / sum(weights)
    wanted = {}
    for name, tensor in base.items():
        a, b = first[name].double(), second[name].double()
        if "rows" in method and tensor.ndim > 1:
            found = torch.stack([naive.slerp_tensor(x, y, t) for x, y in zip(a, b, strict=True)])
        elif "columns" in method and tensor.ndim > 1:
            columns = zip(a.flatten(1).T, b.flatten(1).T, strict=True)
            found = torch.stack([naive.slerp_tensor(x, y, t) for x, y in columns]).T.reshape(tensor.shape)
        else:
            found = naive.slerp_tensor(a, b, t)
        wanted[name] = found + (tensor.double() if on_deltas else 0)
    assert_close(state_dict(merge(method, base, experts, weights=weights)), wanted, 3e-6)


# ── geometry ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["multislerp", "multislerp_delta", "karcher"])
def test_on_one_great_circle_angles_average(method):
    for angles, weights in [((0.1, 1.1), (1, 1)), ((0.0, 1.5), (3, 1)), ((-0.4, 0.2, 0.9), (1, 2, 4))]:
        wanted = on_circle(sum(w * a for w, a in zip(weights, angles, strict=True)) / sum(weights))[0]
        torch.testing.assert_close(one(method, on_circle(*angles), weights=list(weights)), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_of_two_with_one_norm_all_are_slerp(t):
    x, y = (3 * v / v.norm() for v in torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    wanted = one("slerp", [x, y], t=t)
    for method in ("nuslerp", "nuslerp_delta", "multislerp", "multislerp_delta", "karcher"):
        torch.testing.assert_close(one(method, [x, y], weights=[1 - t, t]), wanted, rtol=1e-9, atol=1e-9)


def test_the_karcher_mean_is_where_the_logarithms_cancel():
    x_K = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    u = one("karcher", x_K, weights=weights.tolist())
    assert abs(float(u.norm()) - float((weights * x_K.norm(dim=1)).sum() / weights.sum())) < 1e-9
    u = u / u.norm()
    pull = sum(w * log_map(u, x / x.norm()) for w, x in zip(weights, x_K, strict=True))
    assert float(pull.norm()) < 1e-7
    one_step = one("multislerp", x_K, weights=weights.tolist())
    assert 1e-4 < float((one_step / one_step.norm() - u).norm()) < 0.2, "one step is near, not there"


def test_the_mean_turns_with_the_models():
    random = torch.Generator().manual_seed(2)
    x_K = torch.randn(3, 20, generator=random, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=random, dtype=torch.float64)).Q
    for method in ("multislerp", "karcher"):
        torch.testing.assert_close(one(method, x_K @ turn.T), turn @ one(method, x_K), rtol=0, atol=1e-9)
    assert torch.allclose(one("karcher", torch.eye(3)), torch.full((3,), 3**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("method", ["multislerp", "multislerp_delta", "karcher"])
def test_where_there_is_no_direction(method):
    a = torch.randn(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    zero = torch.zeros(30, dtype=torch.float64)
    assert torch.equal(one(method, [zero, zero, zero]), zero)
    for vectors in (
        [a, -a],
        [a, -2 * a, 0 * a],
        on_circle(0, 2 * math.pi / 3, 4 * math.pi / 3),
    ):  # they cancel: the straight mean
        torch.testing.assert_close(one(method, vectors), sum(vectors) / len(vectors), rtol=0, atol=1e-12)
    torch.testing.assert_close(one(method, [a, zero]), a / 2)  # zero has no direction, but a norm
    torch.testing.assert_close(one(method, [a, a, -a]), a)  # the opposite pole pulls nowhere
    torch.testing.assert_close(one(method, [a, 3 * a]), 2 * a)
    for size in (1e-30, 1e30):
        torch.testing.assert_close(one(method, [size * a, size * a.flip(0)]) / size, one(method, [a, a.flip(0)]))


def test_counts_and_weights_are_checked():
    models = [naive.random_model(i) for i in range(3)]
    for method in ("nuslerp", "nuslerp_delta", "nuslerp_rows", "nuslerp_columns"):
        with pytest.raises(LayoutError, match="exactly 2"):
            merge(method, models[0], models)
        with pytest.raises(ParameterError, match="weights"):
            merge(method, models[0], models[:2], weights=[1, 2, 3])
    for method in ("nuslerp", "nuslerp_rows", "multislerp", "multislerp_delta"):
        with pytest.raises(ParameterError, match="sum to zero"):
            merge(method, models[0], models[:2], weights=[1, -1])
    with pytest.raises(ParameterError, match=r"'karcher', parameter 'weights.1'"):
        merge("karcher", None, models, weights=[1, -1, 1])
    with pytest.raises(ParameterError, match="sum to zero"):
        merge("karcher", None, models, weights=[0, 0, 0])


def test_a_zero_row_takes_the_line():
    a, b = torch.eye(3), torch.zeros(3, 3)
    a[2], b[1] = 0, torch.tensor([0.0, 0.0, 2.0])
    found = state_dict(merge("nuslerp_rows", None, [{"w": a}, {"w": b}]))["w"]
    torch.testing.assert_close(found, torch.tensor([[0.5, 0, 0], [0, 0.5**0.5, 2**0.5], [0, 0, 0]]))


# ── mergekit's formulas ───────────────────────────────────────────────────────────────────────────────────────────────


def mergekits_multislerp(vectors, weights):
    """Its projection for the logarithm; returns the result and the length of its step on the tangent space."""
    units = [x / x.norm() for x in vectors]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    step = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    return exp_map(mean, step) * sum(w * x.norm() for w, x in zip(weights, vectors, strict=True)), float(step.norm())


def test_mergekits_multislerp_never_leaves_the_mean():
    """The fault: with projections the tangent step is Σ a x̂ − ⟨Σ a x̂, u⟩ u, which is 0, since u is Σ a x̂ normalised."""
    random = torch.Generator().manual_seed(4)
    for k in (2, 3, 5):
        vectors = list(torch.randn(k, 30, generator=random, dtype=torch.float64))
        weights = torch.rand(k, generator=random, dtype=torch.float64)
        weights = (weights / weights.sum()).tolist()
        _, step = mergekits_multislerp(vectors, weights)
        assert step < 1e-14
    x, y = on_circle(0, math.pi / 2)
    theirs, _ = mergekits_multislerp([x, y], [0.75, 0.25])
    assert abs(math.atan2(theirs[1], theirs[0]) - math.pi / 8) > 0.05, "it is not a quarter of the way"
    ours = one("multislerp", [x, y], weights=[0.75, 0.25])
    assert abs(math.atan2(ours[1], ours[0]) - math.pi / 8) < 1e-12


def test_near_parallel_models_agree_with_mergekits_multislerp():
    x_K = torch.randn(3, 500, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    vectors = list(10 * x_K[0] + x_K)  # fine-tunes of one base, about 0.1 apart
    theirs, _ = mergekits_multislerp(vectors, [0.5, 0.3, 0.2])
    difference = one("multislerp", vectors, weights=[0.5, 0.3, 0.2]) - theirs
    assert float(difference.norm() / theirs.norm()) < 1e-3


def test_karcher_agrees_with_mergekits():
    x_K = torch.randn(4, 300, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    vectors = list(2 * x_K[0] + x_K)
    units = [x / x.norm() for x in vectors]
    u = sum(units) / sum(units).norm()
    for _ in range(10):
        tangent = torch.zeros_like(u)
        for unit in units:
            angle = torch.arccos((u @ unit).clamp(-1, 1))
            tangent += 0.25 * (angle / torch.sin(angle)) * (unit - (u @ unit) * u)
        if tangent.norm() < 1e-5:
            break
        u = torch.cos(tangent.norm()) * u + torch.sin(tangent.norm()) * tangent / tangent.norm()
        u = u / u.norm()
    theirs = u * sum(x.norm() for x in vectors) / 4
    assert float((one("karcher", vectors) - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("rows", [False, True])
def test_nuslerp_agrees_with_mergekits(rows):
    a, b = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    t = 0.3
    first, second = (a, b) if rows else (a.view(1, -1), b.view(1, -1))
    cos = (first * second).sum(-1, keepdim=True) / first.norm(dim=-1, keepdim=True) / second.norm(dim=-1, keepdim=True)
    angle = torch.acos(cos)
    theirs = (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)
    method = "nuslerp_rows" if rows else "nuslerp"
    torch.testing.assert_close(one(method, [a, b], weights=[1.4, 0.6]), theirs.view(20, 30), rtol=0, atol=1e-12)
