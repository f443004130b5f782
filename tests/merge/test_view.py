"""The lazy merge: what it refuses before reading, how methods of every scope see their tensors, and merges of merges."""

from __future__ import annotations

import pytest
import torch
from tests.laws.cases import size
from tests.merge.conftest import tensors

from eutectic import registry
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.spec import TensorSpec
from eutectic.errors import CheckpointError, EutecticError, LayoutError, ParameterError, RecipeError, UnknownNameError
from eutectic.merge import api
from eutectic.merge.plan import plan
from eutectic.merge.view import Merged, Override
from eutectic.methods._measures import gram
from eutectic.methods._method import Measure, Method, Scope

BASE, A, B = tensors(), tensors(1), tensors(2)


def with_(model, **changes):
    return model | {name.replace("__", "."): tensor for name, tensor in changes.items()}


class Counting(Checkpoint):
    """Counts the elements that are read."""

    def __init__(self, below):
        self.below, self.read_elements, self.closed = Memory(below), 0, False

    @property
    def specs(self):
        return self.below.specs

    def _read(self, name, start, stop):
        self.read_elements += stop - start
        return self.below.read_flat(name, start, stop)

    def close(self):
        self.closed = True


# ── refused before anything is read ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("expert", "says"),
    [
        (with_(A, layer__0__weight=torch.zeros(5, 6)), ["layer.0.weight", "[5, 6] F32", "[6, 5] F32"]),
        (with_(A, extra=torch.zeros(1)), ["extra", "only in expert 'bad'"]),
        ({name: tensor for name, tensor in A.items() if name != "layer.0.bias"}, ["layer.0.bias", "missing from expert 'bad'"]),
        (with_(A, layer__0__bias=A["layer.0.bias"].half()), ["layer.0.bias", "[6] F16", "[6] F32", "dtype"]),
        (with_(A, positions=torch.arange(5).int()), ["positions", "I32", "I64"]),
        (with_(A, positions=torch.arange(5).float()), ["positions", "F32", "I64"]),
        ({}, ["missing from expert 'bad'"]),
    ],
    ids=["shape", "extra", "missing", "dtype", "integer dtype", "float for integer", "empty"],
)
def test_experts_that_do_not_fit(expert, says):
    with pytest.raises(LayoutError) as caught:
        api.merge("task_arithmetic", BASE, {"good": A, "bad": expert})
    for words in says:
        assert words in str(caught.value)
    assert "'good'" not in str(caught.value)


def test_without_a_base_the_first_expert_is_the_measure():
    with pytest.raises(LayoutError, match=r"expert 'y'.*expert 'x'"):
        api.merge("average", None, {"x": A, "y": with_(B, extra=torch.zeros(1))})


def test_a_dtype_accepts_other_floating_dtypes_only():
    half = tensors(2, torch.bfloat16)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        merged = api.merge("task_arithmetic", BASE, [A, half], dtype=dtype, scale=0.5)
        found = api.state_dict(merged)
        wanted = {
            name: BASE[name].double() + 0.5 * ((A[name].double() - BASE[name]) + (half[name].double() - BASE[name]))
            for name in BASE
            if BASE[name].is_floating_point()
        }
        for name, tensor in wanted.items():
            assert found[name].dtype == merged.specs[name].dtype == dtype
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(found[name].double(), tensor, rtol=tolerance, atol=tolerance)
        assert found["positions"].dtype == torch.int64
    with pytest.raises(LayoutError, match="positions"):
        api.merge("average", BASE, [A, with_(B, positions=torch.arange(5).float())], dtype=torch.float32)


def test_a_dtype_must_be_floating():
    with pytest.raises(EutecticError, match="int64"):
        api.merge("average", BASE, [A, B], dtype=torch.int64)


def test_bad_arguments():
    with pytest.raises(LayoutError, match="no experts"):
        api.merge("average", BASE, [])
    with pytest.raises(LayoutError, match="no experts"):
        api.merge("ties", BASE, {})
    with pytest.raises(LayoutError, match=r"ties works on task vectors: name the `base`"):
        api.merge("ties", None, [A, B])
    with pytest.raises(LayoutError, match=r"slerp.*exactly 2 .*got 1"):
        api.merge("slerp", None, [A])
    with pytest.raises(LayoutError, match=r"slerp.*exactly 2 .*got 3"):
        api.merge("slerp", None, [A, B, A])
    with pytest.raises(UnknownNameError, match="Did you mean 'average'"):
        api.merge("avrage", None, [A])
    with pytest.raises(ParameterError, match="Did you mean 'density'"):
        api.merge("ties", BASE, [A], densty=0.1)


@pytest.mark.parametrize("chunk", [0, -4096, 100, 4097])
def test_chunks_are_positive_multiples_of_a_block(chunk):
    with pytest.raises((ValueError, EutecticError), match="4096"):
        Merged("average", None, {"a": Memory(A)}, chunk=chunk)


def test_one_expert_is_fine():
    found = api.state_dict(api.merge("average", None, [A]))
    assert all(torch.equal(found[name], A[name]) for name in A)


# ── laziness ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_read_until_it_is_needed():
    parts = {name: Counting(model) for name, model in (("base", BASE), ("a", A), ("b", B))}
    merged = api.merge("ties", parts["base"], {"a": parts["a"], "b": parts["b"]}, over="tensor")
    assert plan(merged).tensors == 4
    assert [part.read_elements for part in parts.values()] == [0, 0, 0]
    merged.read("layer.0.bias")
    assert {part.read_elements for part in parts.values()} == {6 * merged.passes()}
    merged.read("layer.0.bias")  # measured once
    assert {part.read_elements for part in parts.values()} == {6 * (merged.passes() + 1)}


def test_elementwise_methods_read_no_more_than_they_give():
    parts = [Counting(model) for model in (BASE, A, B)]
    api.merge("task_arithmetic", parts[0], parts[1:]).read("layer.0.weight", slice(2, 4))
    assert [part.read_elements for part in parts] == [10, 10, 10]


def test_weight_space_does_not_read_the_base():
    base = Counting(BASE)
    api.merge("average", base, [A, B]).read("layer.0.weight")
    assert base.read_elements == 0


def test_measuring_beforehand_changes_nothing():
    merged = api.merge("ties", BASE, [A, B])
    for name in merged.specs:
        merged.prepare(name)
    assert all(torch.equal(merged.read(n), t) for n, t in api.state_dict(api.merge("ties", BASE, [A, B])).items())


def test_closing_closes_the_inputs():
    parts = [Counting(model) for model in (BASE, A, B)]
    with api.merge("average", parts[0], parts[1:]):
        pass
    assert all(part.closed for part in parts)


def test_reads_are_checked():
    merged = api.merge("average", None, [A, B])
    with pytest.raises(CheckpointError, match=r"no tensor 'layer.0.wieght'. Did you mean 'layer.0.weight'"):
        merged.read("layer.0.wieght")
    with pytest.raises(CheckpointError, match="6 elements"):
        merged.read_flat("layer.0.bias", 3, 9)


def test_the_plan_counts():
    merged = api.merge("ties", BASE, [A, B])
    found = plan(merged)
    assert (found.tensors, found.merged_tensors, found.parameters) == (4, 3, 30 + 6 + 24 + 5)
    assert found.passes == 3
    assert found.write_bytes == 60 * 4 + 5 * 8
    assert found.read_bytes == 3 * 3 * found.write_bytes
    assert found.work_bytes > 0
    assert plan(api.merge("average", None, [A, B])).passes == 1


def test_a_model_without_elements():
    empty = {"e": torch.zeros(0, 3), "n": torch.zeros(2, 0)}
    for name in registry.names("methods"):
        found = api.state_dict(api.merge(name, empty, [empty] * size(name, {}, 2)))
        assert [tuple(tensor.shape) for tensor in found.values()] == [(0, 3), (2, 0)]


def test_a_model_without_floating_tensors():
    only = {"i": torch.arange(3)}
    for name in registry.names("methods"):
        assert api.state_dict(api.merge(name, only, [only] * size(name, {}, 2)))["i"].tolist() == [0, 1, 2]


# ── overrides ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def overridden(method, parameters, *overrides):
    held = {"a": Memory(A), "b": Memory(B)}
    return Merged(method, Memory(BASE), held, parameters, [Override(match, values) for match, values in overrides])


def test_overrides_go_by_pattern_and_the_last_wins():
    merged = overridden("task_arithmetic", {"scale": 0.5}, ("layer.0.*", {"scale": 0.0}), ("*.bias", {"scale": 1.0}))
    for name, scale in (("layer.0.weight", 0.0), ("layer.0.bias", 1.0), ("layer.1.weight", 0.5)):
        wanted = api.merge("task_arithmetic", BASE, {"a": A, "b": B}, scale=scale).read(name)
        assert torch.equal(merged.read(name), wanted), name


def test_an_override_changes_only_what_it_names():
    merged = overridden("ties", {"scale": 0.5, "over": "tensor"}, ("*.bias", {"density": 1}))
    wanted = api.merge("ties", BASE, {"a": A, "b": B}, scale=0.5, density=1)
    assert torch.equal(merged.read("layer.0.bias"), wanted.read("layer.0.bias"))


def test_ranking_over_the_model_is_over_the_tensors_with_the_same_parameters():
    merged = overridden("ties", {"density": 0.3}, ("layer.1.*", {"scale": 2.0}))
    some = [{name: model[name] for name in ("layer.0.weight", "layer.0.bias")} for model in (BASE, A, B)]
    wanted = api.merge("ties", some[0], some[1:], density=0.3)
    assert torch.equal(merged.read("layer.0.weight"), wanted.read("layer.0.weight"))


def test_an_override_that_matches_nothing_is_misspelt():
    with pytest.raises(RecipeError, match=r"'layr\.\*' matches no tensor"):
        overridden("ties", {}, ("layr.*", {"scale": 1.0}))
    with pytest.raises(ParameterError, match="'scael'"):
        overridden("ties", {}, ("layer.*", {"scael": 1.0}))
    with pytest.raises(ParameterError, match="'density' = 3"):
        overridden("ties", {}, ("layer.*", {"density": 3}))


# ── merges of merges ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["average", "ties", "dare", "slerp"])
def test_a_merge_of_merges_is_the_merge_of_their_results(method):
    inner = api.merge("task_arithmetic", BASE, [A, B], scale=0.4)
    other = api.merge("ties", BASE, [A, B])
    lazy = api.merge(method, BASE, {"x": inner, "y": other})
    eager = api.merge(method, BASE, {"x": api.state_dict(inner), "y": api.state_dict(other)})
    assert all(torch.equal(tensor, lazy.read(name)) for name, tensor in api.state_dict(eager).items())


def test_an_expert_that_is_a_merge_of_whole_tensors_is_read_in_whole_tensors():
    inner = api.merge("tsv_m", BASE, [A, B])
    outer = api.merge("task_arithmetic", BASE, [inner, A])
    assert outer.grain("layer.0.weight") == inner.grain("layer.0.weight") == 30
    assert outer.grain("layer.0.bias") == outer.grain("positions") == 1


def test_a_merge_may_be_a_base():
    base = api.merge("average", None, [A, B])
    lazy = api.merge("task_arithmetic", base, [A, B], scale=0.5)
    eager = api.merge("task_arithmetic", api.state_dict(base), [A, B], scale=0.5)
    assert all(torch.equal(tensor, lazy.read(name)) for name, tensor in api.state_dict(eager).items())


# ── scopes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def register(monkeypatch, method):
    """Give this module's method ``probe`` to the registry."""
    known = registry.names("methods")
    monkeypatch.setattr(registry, "names", lambda room: known | {"probe": f"{__name__}:probe"})
    monkeypatch.setattr(registry, "get", lambda room, name: (lambda: method) if name == "probe" else None)


BIG = {"matrix": (50, 333), "cube": (7, 20, 90), "vector": (9000,), "scalar": (), "wide": (2, 6000), "one": (1, 1)}


def big(seed):
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in BIG.items()}


@pytest.mark.parametrize("chunk", [4096, 8192, 1 << 20])
def test_row_scope_sees_whole_rows(monkeypatch, chunk):
    seen = {}

    def centred(x_K, site, stats):
        seen.setdefault(site.name, []).append((site.start, tuple(x_K.shape)))
        return x_K.sum(0) - x_K.sum(0).mean(1, keepdim=True)

    register(monkeypatch, Method(centred, Scope.ROW, space="weight"))
    models = {"a": big(1), "b": big(2)}
    merged = Merged("probe", None, {name: Memory(model) for name, model in models.items()}, chunk=chunk)
    for name, shape in BIG.items():
        width = models["a"][name][0].numel() if len(shape) > 1 else models["a"][name].numel()
        rows = sum(models[m][name].reshape(-1, width) for m in models)
        wanted = (rows - rows.mean(1, keepdim=True)).view(shape)
        torch.testing.assert_close(merged.read(name), wanted)
        whole = merged.read(name).reshape(-1)
        for start, stop in [(0, 1), (1, min(500, whole.numel())), (max(0, whole.numel() - 3), whole.numel())]:
            torch.testing.assert_close(merged.read_flat(name, start, stop), whole[start:stop])
        for start, (k, count, found) in seen[name]:
            assert (k, found) == (2, width)
            assert start % width == 0
            assert count * width <= max(chunk, width)


@pytest.mark.parametrize("chunk", [4096, 1 << 20])
def test_tensor_scope_sees_whole_tensors_in_their_shape(monkeypatch, chunk):
    def turned(x_K, site, stats):
        assert tuple(x_K.shape) == (2, *site.shape)
        assert (site.start, site.experts) == (0, ("a", "b"))
        return x_K.mean(0).flatten().flip(0).view(site.shape)

    register(monkeypatch, Method(turned, Scope.TENSOR, space="weight"))
    models = {"a": big(1), "b": big(2)}
    merged = Merged("probe", None, {name: Memory(model) for name, model in models.items()}, chunk=chunk)
    for name in BIG:
        wanted = ((models["a"][name] + models["b"][name]) / 2).flatten().flip(0)
        torch.testing.assert_close(merged.read(name).flatten(), wanted)
        torch.testing.assert_close(merged.read_flat(name, wanted.numel() // 2, wanted.numel()), wanted[wanted.numel() // 2 :])


def test_measures_see_every_element_once_and_the_stats_before_them(monkeypatch):
    def counted(over):
        def observe(state, x_K, site, stats):
            assert ("gram" in stats) is True
            return state + x_K[0].numel()

        return Measure(f"count {over}", lambda k: 0, observe, lambda a, b: a + b, lambda state: state, over)

    def apply(x_K, site, stats):
        assert torch.equal(stats["gram"], stats["gram"].T)
        return x_K.sum(0) * 0 + stats["count tensor"] + 1e6 * stats["count model"]

    register(monkeypatch, Method(apply, measures=(gram(), counted("tensor"), counted("model")), space="weight"))
    merged = Merged("probe", None, {"a": Memory(big(1)), "b": Memory(big(2))}, chunk=4096)
    total = sum(tensor.numel() for tensor in big(1).values())
    assert merged.passes() == 4
    for name, tensor in big(1).items():
        found = merged.read(name)
        torch.testing.assert_close(found, torch.full_like(tensor, tensor.numel() + 1e6 * total))


def test_sites_name_where_a_chunk_lies(monkeypatch):
    sites = []

    def apply(x_K, site, stats):
        sites.append((site.name, site.shape, site.start, site.experts, tuple(x_K.shape)))
        return x_K.sum(0)

    register(monkeypatch, Method(apply, space="weight"))
    merged = Merged("probe", None, {"a": Memory(big(1)), "b": Memory(big(2))}, chunk=8192)
    merged.read_flat("vector", 5, 9000)
    assert sites == [
        ("vector", (9000,), 5, ("a", "b"), (2, 8192)),
        ("vector", (9000,), 8197, ("a", "b"), (2, 803)),
    ]
    assert merged.specs["vector"] == TensorSpec((9000,), torch.float32)
