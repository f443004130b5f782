"""The contract of a method: every registered one, built-in or not, is run through these laws."""

from __future__ import annotations

import functools
import inspect
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.laws.cases import (
    CASES,
    INTEGERS,
    NAMES,
    base_model,
    case,
    differing,
    expert_of,
    experts_of,
    run_id,
    runs,
    same,
    size,
)

from eutectic import registry
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.save import save_tensors
from eutectic.errors import EutecticError, LayoutError, NonFiniteError, ParameterError
from eutectic.merge import api
from eutectic.merge.run import save
from eutectic.merge.view import Merged
from eutectic.methods._method import build, signature_model, validated

every_run = pytest.mark.parametrize("run", runs(), ids=run_id)
every_method = pytest.mark.parametrize("name", NAMES)


def merged(name, parameters, base, experts, **options):
    held = {key: Memory(tensors, origin=f"<{key}>") for key, tensors in experts.items()}
    return Merged(name, Memory(base, origin="<base>"), held, parameters, **options)


def of_run(run, **options):
    name, parameters, wanted = run
    return merged(name, parameters, base_model(), experts_of(size(name, parameters, wanted)), **options)


def whole(run):
    return _whole(runs().index(run))


@functools.cache
def _whole(i):
    return api.state_dict(of_run(runs()[i]))


def close(found, wanted):
    for key in wanted:
        exact = wanted[key].dtype == torch.float64
        coarse = wanted[key].dtype in (torch.float16, torch.bfloat16)
        tolerance = 1e-12 if exact else 1e-2 if coarse else 2e-6
        torch.testing.assert_close(
            found[key], wanted[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


# ── streamed ≡ in memory, any chunk ≡ whole ───────────────────────────────────────────────────────────────────────────


@every_run
def test_neither_chunk_nor_order_nor_threads_change_a_bit(run):
    wanted = whole(run)
    names = random.Random(0).sample(list(wanted), len(wanted))
    one_by_one, at_once = of_run(run, chunk=8192), of_run(run, chunk=4096)
    for name in names:
        assert same(one_by_one.read(name), wanted[name]), f"{name} in chunks of 8192"
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(names, pool.map(at_once.read, names), strict=True):
            assert same(found, wanted[name]), f"{name} in chunks of 4096, by four threads"


@every_run
def test_any_range_is_a_slice_of_the_whole(run):
    wanted, lazy = whole(run), of_run(run, chunk=4096)
    for name, tensor in wanted.items():
        n = tensor.numel()
        for start, stop in [(0, 1), (1, 2), (0, 3), (5, 12), (17, 4099), (100, 133), (3, n), (n - 7, n), (n - 1, n), (n, n)]:
            if 0 <= start <= stop <= n:
                assert same(lazy.read_flat(name, start, stop), tensor.reshape(-1)[start:stop]), f"{name}[{start}:{stop}]"
        if tensor.ndim:
            for rows in (slice(0, 1), slice(1, 3), slice(None, None), slice(2, 2), slice(-1, None)):
                assert same(lazy.read(name, rows), tensor[rows]), f"{name} {rows}"


@every_run
def test_streamed_from_sharded_files_is_in_memory(run, tmp_path):
    name, parameters, wanted = run
    base = base_model()
    models = {"base": base, **experts_of(size(name, parameters, wanted))}
    for key, tensors in models.items():
        (tmp_path / key).mkdir()
        save_tensors(Memory(tensors), tmp_path / key, max_shard_bytes=30_000)
        assert len(list((tmp_path / key).glob("*.safetensors"))) > 1
    paths = {key: tmp_path / key for key in models if key != "base"}
    (tmp_path / "streamed").mkdir()
    with api.merge(name, tmp_path / "base", paths, **parameters) as lazy:
        save_tensors(lazy, tmp_path / "streamed", max_shard_bytes=40_000, threads=3)
        save(lazy, tmp_path / "saved")
    wanted = api.state_dict(api.merge(name, base, {key: models[key] for key in paths}, **parameters))
    for folder in ("streamed", "saved"):
        with api.open(tmp_path / folder) as found:
            assert not differing(api.state_dict(found), wanted), folder


@every_method
def test_torchs_threads_do_not_change_a_bit(name):
    random = torch.Generator().manual_seed(0)
    base = {"matrix": torch.randn(300, 200, generator=random), "vector": torch.randn(70_000, generator=random)}
    k = size(name, {})
    experts = {str(i): {key: t + 0.1 * torch.randn(t.shape, generator=random) for key, t in base.items()} for i in range(k)}
    wanted = api.state_dict(merged(name, {}, base, experts))
    torch.set_num_threads(2)
    assert not differing(api.state_dict(merged(name, {}, base, experts)), wanted)


# ── what a merge must be ──────────────────────────────────────────────────────────────────────────────────────────────


@every_method
def test_names_shapes_and_dtypes_are_kept(name):
    base = base_model()
    lazy = merged(name, {}, base, experts_of(size(name, {})))
    assert list(lazy.specs) == list(base)
    for key, tensor in api.state_dict(lazy).items():
        assert (tensor.shape, tensor.dtype) == (base[key].shape, base[key].dtype), key
        assert (tuple(tensor.shape), tensor.dtype) == lazy.specs[key]


@every_method
def test_integers_and_booleans_are_the_bases(name):
    k = size(name, {})
    base = base_model()
    experts = experts_of(k)
    for tensors in experts.values():
        tensors |= {"steps": torch.tensor(99), "mask": ~base["mask"]}
    found = api.state_dict(merged(name, {}, base, experts))
    assert [same(found[key], base[key]) for key in INTEGERS] == [True] * len(INTEGERS)


@every_method
def test_inputs_are_not_written_to(name):
    k = size(name, {})
    base = {key: tensor.clone() for key, tensor in base_model().items()}
    models = [base, *({key: tensor.clone() for key, tensor in expert.items()} for expert in experts_of(k).values())]
    before = [fingerprint(Memory(tensors)) for tensors in models]
    out = api.state_dict(merged(name, {}, base, {str(i): tensors for i, tensors in enumerate(models[1:])}))
    for tensor in out.values():
        tensor.zero_()
    assert [fingerprint(Memory(tensors)) for tensors in models] == before


@every_method
def test_zero_task_vectors_give_the_base(name):
    k = size(name, {})
    base = base_model()
    close(api.state_dict(merged(name, {}, base, {str(i): base for i in range(k)})), base)


@every_method
def test_one_expert_comes_back(name):
    parameters = case(name).alone
    if parameters is None:
        least, _ = build(name, {}).experts
        if least == 1:
            pytest.skip("declared not to hold")
        with pytest.raises(LayoutError, match=f"(exactly|at least) {least}"):
            merged(name, {}, base_model(), experts_of(1))
        return
    base = base_model()
    expert = expert_of(0)
    close(api.state_dict(merged(name, parameters, base, {"a": expert})), expert)


@every_method
def test_identical_experts(name):
    parameters = case(name).identical
    if parameters is None:
        pytest.skip("declared not to hold")
    base = base_model()
    expert = expert_of(0)
    k = size(name, parameters)
    gain = case(name).gain(k)
    wanted = {
        key: (base[key].double() + gain * (expert[key].double() - base[key].double())).to(base[key].dtype)
        for key in base
        if base[key].is_floating_point()
    }
    close(api.state_dict(merged(name, parameters, base, {str(i): expert for i in range(k)})), wanted)


@every_method
def test_the_order_of_the_named_experts_does_not_matter(name):
    parameters = case(name).unordered
    if parameters is None:
        pytest.skip("declared not to hold")
    base = base_model()
    experts = experts_of(size(name, parameters))
    wanted = api.state_dict(merged(name, parameters, base, experts))
    for turn in (lambda keys: keys[::-1], lambda keys: keys[1:] + keys[:1]):
        turned = {key: experts[key] for key in turn(list(experts))}
        close(api.state_dict(merged(name, parameters, base, turned)), wanted)


# ── what a merge must refuse ──────────────────────────────────────────────────────────────────────────────────────────


@every_method
@pytest.mark.parametrize(
    ("tensor", "bad"),
    [
        ("embed.weight", float("nan")),
        ("block.qkv", float("inf")),
        ("block.conv", float("nan")),
        ("block.double", float("-inf")),
        ("scale", float("nan")),
        ("transposed", float("inf")),
    ],
)
def test_nan_and_inf_are_reported_with_tensor_and_expert(name, tensor, bad):
    base = base_model()
    experts = experts_of(size(name, {}))
    last = list(experts)[-1]
    broken = experts[last][tensor].clone()
    broken[(-1,) * broken.ndim] = bad
    experts[last][tensor] = broken
    lazy = merged(name, {}, base, experts)
    with pytest.raises(NonFiniteError, match=rf"expert '{last}' \(<{last}>\).*'{re.escape(tensor)}'"):
        lazy.read(tensor)


@every_method
def test_a_nan_in_the_base_is_reported_if_the_base_is_read(name):
    if build(name, {}).space == "weight":
        pytest.skip("reads no base")
    base = base_model()
    experts = experts_of(size(name, {}))
    broken = {**base, "embed.weight": torch.full_like(base["embed.weight"], float("nan"))}
    with pytest.raises(NonFiniteError, match=r"base \(<base>\).*'embed.weight'"):
        merged(name, {}, broken, experts).read("embed.weight")


@every_method
def test_huge_finite_weights_are_no_error(name):
    parameters = case(name).identical or {}
    k = size(name, parameters)
    base = {"f": torch.zeros(3), "d": torch.zeros(3, dtype=torch.float64)}
    expert = {"f": torch.full((3,), 3e37), "d": torch.full((3,), 1e150, dtype=torch.float64)}
    found = api.state_dict(merged(name, parameters, base, {str(i): expert for i in range(k)}))
    if case(name).identical is None:
        return  # that there is no error is all that can be said
    gain = case(name).gain(k)
    torch.testing.assert_close(found["f"].double(), gain * expert["f"].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["d"], gain * expert["d"], rtol=1e-12, atol=0)


@every_method
def test_overflow_is_reported_and_not_written(name, tmp_path):
    parameters = case(name).overflow
    if parameters is None:
        pytest.skip("declared impossible")
    base = {"w": torch.tensor([1.0, -2.0, 3.0], dtype=torch.float16)}
    values = [1e4, 6e4, 5e4, 4e4]
    experts = {f"e{i}": {"w": torch.full((3,), values[i], dtype=torch.float16)} for i in range(size(name, parameters))}
    lazy = merged(name, parameters, base, experts)
    with pytest.raises(NonFiniteError, match=r"'w' overflows torch\.float16"):
        save(lazy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@every_method
def test_misspelt_parameters_are_named_with_the_nearest(name):
    properties = signature_model(name).model_fields
    for key in properties:
        with pytest.raises(ParameterError, match=rf"'{name}' has no parameter '{key}x'. Did you mean '{key}'\?"):
            build(name, {f"{key}x": 1})
    with pytest.raises(ParameterError, match=rf"'{name}' has no parameter 'qqq'\."):
        build(name, {"qqq": 1})


def _bad_values(schema):
    kinds = schema.get("anyOf", [schema])
    types = {kind.get("type") for kind in kinds}
    yield from ({"a": "mapping"}, object())
    if types & {"number", "integer"}:
        yield from (float("nan"), float("inf"), "seven")
    if "array" in types:
        yield from ([float("nan")], ["seven"])
    if "array" not in types:
        yield [1]
    if not types & {"number", "integer"}:
        yield 3
    for kind in kinds:
        if "minimum" in kind:
            yield kind["minimum"] - 1
        if "exclusiveMinimum" in kind:
            yield kind["exclusiveMinimum"]
        if "maximum" in kind:
            yield kind["maximum"] + 1
        if "exclusiveMaximum" in kind:
            yield kind["exclusiveMaximum"]
        if "enum" in kind:
            yield "none of these"


@every_method
def test_parameters_out_of_range_are_named(name):
    for key, schema in signature_model(name).model_json_schema()["properties"].items():
        for bad in _bad_values(schema):
            with pytest.raises(ParameterError, match=rf"method '{name}', parameter '{key}(\.[^']*)?' = "):
                build(name, {key: bad})


@every_method
def test_counts_are_enforced(name):
    base = base_model()
    least, most = build(name, {}).experts
    for count in {0, least - 1} | ({most + 1} if most is not None else set()):
        with pytest.raises(LayoutError, match=name):
            merged(name, {}, base, experts_of(count))
    if build(name, {}).space == "delta":
        held = {key: Memory(tensors) for key, tensors in experts_of(least).items()}
        with pytest.raises(LayoutError, match="`base`"):
            Merged(name, None, held)


@every_method
def test_methods_in_weight_space_ignore_the_base(name):
    if build(name, {}).space == "delta":
        pytest.skip("needs the base")
    base = base_model()
    experts = {key: Memory(tensors) for key, tensors in experts_of(size(name, {})).items()}
    with_base = api.state_dict(Merged(name, Memory(base), experts))
    without = api.state_dict(Merged(name, None, experts))
    assert differing(with_base, without) == []


# ── how it is written ─────────────────────────────────────────────────────────────────────────────────────────────────


@every_method
def test_the_docstring_says_what_it_must(name):
    doc = inspect.getdoc(registry.get("methods", name))
    assert doc
    assert doc.splitlines()[0].endswith(".")
    assert "Source:" in doc
    assert re.search(r"\b[Dd]iffers?\b", doc), "say in what it differs from the paper, or that it does not differ"
    assert re.search(r"\b(19|20)\d\d\b", doc.partition("Source:")[2]), "the source has no year"
    for key in signature_model(name).model_fields:
        assert re.search(rf"^\s+{key}: ", doc, re.MULTILINE), f"Args: does not explain {key}"
        assert not doc.rstrip().endswith(f"{key}:")


@every_method
def test_the_module_cites_and_is_short(name):
    module = registry.module("methods", name)
    assert re.search(r"\b(19|20)\d\d\b", module.REFERENCE)
    assert registry.reference("methods", name) == module.REFERENCE
    assert module.__doc__
    assert len(Path(inspect.getfile(module)).read_text(encoding="utf-8").splitlines()) <= 120


@every_method
def test_the_schema_is_json_and_the_defaults_are_valid(name):
    schema = signature_model(name).model_json_schema()
    assert schema["additionalProperties"] is False
    if not schema.get("required"):
        defaults = validated(name, {})
        assert validated(name, defaults) == defaults
        assert build(name, {}).experts[0] >= 1


@every_method
def test_the_grid_is_of_valid_parameters(name):
    for key, candidates in getattr(registry.module("methods", name), "GRID", {}).items():
        assert candidates
        for candidate in candidates:
            build(name, {key: candidate})


def test_declarations_are_of_registered_methods():
    assert set(CASES) <= set(NAMES)
    for name in CASES:
        for parameters in (*case(name).variants, case(name).alone, case(name).identical, case(name).unordered):
            build(name, parameters or {})


def test_unknown_methods_are_refused_with_the_nearest():
    with pytest.raises(EutecticError, match=r"no method is called 'tyes'. Did you mean 'ties'"):
        registry.get("methods", "tyes")
