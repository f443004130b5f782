"""LiNeS and SVC, which wrap another method, against their equations in loops."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import naive
from tests.oracle.matrices import SHAPES, close, lora, model, task_vectors

from eutectic.checkpoint.base import Memory
from eutectic.errors import LayoutError, ParameterError, UnknownNameError
from eutectic.merge.api import merge, state_dict
from eutectic.merge.view import Merged


def wrapped(name, base, experts, **parameters):
    """``merge`` without its keywords, one of which the wrappers' ``method`` would be."""
    held = experts if isinstance(experts, dict) else {str(i): expert for i, expert in enumerate(experts)}
    return Merged(name, Memory(base), {key: Memory(tensors) for key, tensors in held.items()}, parameters)


#: every kind of measure and scope: none, per tensor, over the model, rows, whole tensors
INNER = [
    ("task_arithmetic", {"scale": 0.3}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "over": "tensor"}),
    ("dare", {"seed": 3}),
    ("della", {"seed": 3}),
    ("breadcrumbs", {"gamma": 0.1}),
    ("cabs", {"n": 2, "m": 5}),
    ("emr", {"expert": "1"}),
    ("tsv_m", {}),
]

# ── LiNeS ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

BLOCKS = {
    "embed.weight": None,
    "layers.0.w": 0,
    "layers.1.mlp.3.w": 1,
    "layers.4.w": 4,
    "layers.4.b": 4,
    "layers.2.norm": 2,
    "norm.weight": None,
    "h11": None,
}


def blocks(seed):
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn((6, 10) if name[-1] == "w" else (13,), generator=random) for name in BLOCKS}


@pytest.mark.parametrize(("method", "parameters"), INNER)
def test_lines(method, parameters, assert_close):
    base, experts = blocks(0), [blocks(i) for i in (1, 2, 3)]
    plain = state_dict(merge(method, base, experts, **parameters))
    found = state_dict(wrapped("lines", base, experts, method=method, parameters=parameters, alpha=0.3, beta=1.2))
    wanted = {
        name: base[name].double() + (0.3 + 1.2 * (block or 0) / 4) * (plain[name].double() - base[name].double())
        for name, block in BLOCKS.items()
    }
    assert_close(found, wanted, 3e-6)


def test_lines_of_task_arithmetic_by_default(assert_close):
    base, experts = blocks(0), [blocks(i) for i in (1, 2)]
    sums = naive.task_arithmetic(base, experts, 0.3)
    wanted = {
        name: base[name].double() + (0.5 + 0.5 * (block or 0) / 4) * (sums[name] - base[name].double())
        for name, block in BLOCKS.items()
    }
    assert_close(state_dict(merge("lines", base, experts)), wanted)


@pytest.mark.parametrize("name", ["w", "layers.0.w", "layers.7.w"])
def test_lines_in_models_of_one_or_no_block(name):
    base, expert = {name: torch.zeros(4)}, {name: torch.ones(4)}
    found = state_dict(merge("lines", base, [expert], parameters={"scale": 1}, alpha=0.25, beta=0.5))[name]
    assert found.tolist() == [0.75 if "7" in name else 0.25] * 4


# ── SVC ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def svc(merged, taus, alpha):
    """Equations 4, 8 and 9 and Algorithm 1, direction by direction."""
    U, s, Vh = torch.linalg.svd(merged, full_matrices=False)
    out = torch.zeros_like(merged)
    for u, strength, v in zip(U.T, s, Vh, strict=True):
        coefficients = [(u @ merged) @ (u @ tau) / ((u @ tau) @ (u @ tau)) for tau in taus]
        gamma = len(taus) / sum(max(alpha, float(c)) for c in coefficients)
        out += gamma * strength * torch.outer(u, v)
    return out


@pytest.mark.parametrize("alpha", [None, 0.1, 1.0])
@pytest.mark.parametrize(("method", "parameters"), INNER)
def test_svc(method, parameters, alpha):
    base, experts = model(3)
    plain = state_dict(merge(method, base, experts, **parameters))
    found = state_dict(wrapped("svc", base, experts, method=method, parameters=parameters, alpha=alpha))
    for name in ("wide", "tall", "square"):
        wanted = base[name] + svc(plain[name] - base[name], task_vectors(base, experts, name), alpha or 1 / 3)
        close(found[name], wanted, 1e-6)
    for name in SHAPES.keys() - {"wide", "tall", "square"}:
        close(found[name], plain[name], 1e-12)


@pytest.mark.parametrize("scale", [0.4, 1.0, 7.0])
def test_svc_takes_back_what_adding_the_same_overcounts(scale):
    base, (expert,) = model(1)
    found = state_dict(merge("svc", base, [expert] * 4, parameters={"scale": scale}))
    for name in ("wide", "tall", "square"):
        close(found[name], expert[name], 1e-9)


@pytest.mark.parametrize(("alpha", "factor"), [(1.0, 1.0), (None, 3 / (1 + 2 / 3)), (0.01, 3 / 1.02)])
def test_svc_of_tasks_in_spaces_of_their_own(alpha, factor):
    # a task with nothing in a direction has 0 / 0 there, which counts as 0, also in float32, where it is rounding
    random = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(30, 24, generator=random, dtype=torch.float64)).Q
    strengths = torch.linspace(1, 3, 24, dtype=torch.float64)
    taus = [frame[:, c : c + 8] * strengths[c : c + 8] @ other[:, c : c + 8].T for c in (0, 8, 16)]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        experts = [{"w": tau.to(dtype)} for tau in taus]
        found = state_dict(merge("svc", {"w": torch.zeros(24, 30, dtype=dtype)}, experts, parameters={"scale": 1}, alpha=alpha))
        close(found["w"], factor * sum(taus), tolerance)


@pytest.mark.parametrize("k", [1, 3])
def test_svc_of_low_rank(k):
    base, experts, columns, rows = lora(k)
    found = state_dict(merge("svc", base, experts, parameters={"scale": 1}))["w"].double()
    taus = [expert["w"].double() for expert in experts]
    U, s, Vh = (part[..., : 2 * k] if i < 2 else part[: 2 * k] for i, part in enumerate(torch.linalg.svd(sum(taus))))
    shares = [[float((a @ (u @ t)) / ((u @ t) @ (u @ t))) for t in taus] for u, a in zip(U.T, s[:, None] * Vh, strict=True)]
    gamma = torch.tensor([k / sum(max(1 / k, share) for share in row) for row in shares], dtype=torch.float64)
    close(found, U * (gamma * s) @ Vh, 1e-5)
    for frame, side in ((columns, found), (rows, found.T)):
        assert (side - frame @ (frame.T @ side)).abs().max() < 1e-5 * found.abs().max()
    assert torch.equal(state_dict(merge("svc", experts[0], [experts[0]] * 2))["w"], experts[0]["w"])


# ── both ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["lines", "svc"])
def test_wrappers_wrap_wrappers_and_are_the_same_in_any_chunks(name):
    random = torch.Generator().manual_seed(0)
    shapes = {"h.0.w": (90, 70), "h.1.w": (5, 3, 401), "h.2.b": (9001,), "s": (), "none": (0, 3)}
    base = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    experts = {str(i): Memory({key: t + torch.randn(t.shape, generator=random) for key, t in base.items()}) for i in range(3)}
    inside = {"lines": "svc", "svc": "lines"}[name]
    for method, parameters in (*INNER, (inside, {"method": "ties", "parameters": {"density": 0.4}})):

        def read(chunk, keys, method=method, parameters=parameters):
            lazy = Merged(name, Memory(base), experts, {"method": method, "parameters": parameters}, chunk=chunk)
            return {key: lazy.read(key) for key in keys}

        wanted, found = read(1 << 20, list(base)), read(4096, list(base)[::-1])
        assert all(torch.equal(found[key], tensor) and tensor.isfinite().all() for key, tensor in wanted.items()), method


@pytest.mark.parametrize("name", ["lines", "svc"])
def test_what_wrappers_refuse(name):
    base, experts = model(2)
    with pytest.raises(UnknownNameError, match="Did you mean 'ties'"):
        wrapped(name, base, experts, method="tyes")
    with pytest.raises(ParameterError, match=rf"'{name}', parameter 'method' = 'slerp'.*task vectors"):
        wrapped(name, base, experts, method="slerp")
    with pytest.raises(ParameterError, match=rf"'{name}', parameter 'parameters' = .*'ties' has no parameter 'densty'"):
        wrapped(name, base, experts, method="ties", parameters={"densty": 0.5})
    with pytest.raises(ParameterError, match=rf"'{name}', parameter 'parameters' = .*'ties', parameter 'density' = 2"):
        wrapped(name, base, experts, method="ties", parameters={"density": 2})
    with pytest.raises(LayoutError, match="exactly 3"):
        wrapped(name, base, experts, method="task_arithmetic", parameters={"weights": [1, 2, 3]})
