"""Low-rank factors of the experts' changes: against the exact decomposition, and as a checkpoint that makes them when read."""

import json
import threading

import pytest
import safetensors.torch
import torch

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.hashed import Hashed
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.views import Cast, Overlay, Rename, Select
from eutectic.errors import NonFiniteError
from eutectic.fusion import _lowrank
from eutectic.fusion._lowrank import Factors, Layer, change, most_directions
from eutectic.methods import _spectral
from eutectic.methods._spectral import sketched, svd, svd_of_product

PLACES = torch.arange(1, 321.0)
SPECTRA = {
    "flat": torch.ones(320),
    "slow": PLACES**-0.5,
    "middling": 1 / PLACES,
    "fast": 1 / PLACES**2,
    "geometric": 0.9**PLACES,
    "gap": torch.where(PLACES <= 9, 1.0, 0.05),
    "low rank": torch.where(PLACES <= 9, 1 / PLACES, 0.0),
}


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix(spectrum, m, n):
    U, V = (torch.linalg.qr(drawn(size, 320, seed=size, dtype=torch.float64))[0] for size in (m, n))
    return ((U * spectrum) @ V.T).float()


def left_over(x, found):
    return float((x.double() - (found.U.double() * found.s.double()) @ found.Vh.double()).norm())


@pytest.mark.parametrize("most", [1, 16, 70])
@pytest.mark.parametrize("shape", [(320, 320), (320, 700), (700, 320)])
@pytest.mark.parametrize("kind", [*SPECTRA, "random"])
def test_a_sketch_leaves_hardly_more_than_the_exact_decomposition_does(kind, shape, most):
    x = drawn(*shape) if kind == "random" else matrix(SPECTRA[kind], *shape)
    found = sketched(x, most, 1)
    best = torch.linalg.svdvals(x.double())[most:].norm()
    assert float(best) - 1e-5 <= left_over(x, found) <= 1.01 * float(best) + 1e-5
    r = min(most, 9 if kind == "low rank" else most)
    assert (found.U.shape, found.s.shape, found.Vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
    for rows in (found.U.T, found.Vh):
        torch.testing.assert_close(rows @ rows.T, torch.eye(r), rtol=0, atol=1e-5)
    assert (found.s.diff() <= 0).all()
    # what it leaves, told of its own numbers
    assert left_over(x, found) ** 2 == pytest.approx(float(x.square().sum() - found.s.square().sum()), rel=1e-3, abs=1e-4)


def test_a_sketch_depends_on_its_seed_alone_and_is_exact_where_most_directions_are_asked_for(monkeypatch):
    x = drawn(320, 400)
    before = sketched(x, 16, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(before, sketched(x, 16, 1), strict=True))
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(before.s, sketched(x, 16, 2).s)
    assert all(torch.equal(a, b) for a, b in zip(svd(x, most=100), sketched(x, 100, 1), strict=True))
    assert len(sketched(torch.zeros(320, 320), 16, 1).s) == 0
    monkeypatch.setattr(_spectral, "BLOCKS", 1)
    assert left_over(x, sketched(x, 16, 1)) > left_over(x, before)


@pytest.mark.parametrize(("m", "n", "r"), [(30, 50, 4), (50, 30, 4), (3, 50, 4), (50, 3, 4), (30, 50, 0)])
def test_a_product_is_decomposed_as_the_matrix_that_it_is(m, n, r):
    left, right = drawn(m, r, seed=1), drawn(r, n, seed=2)
    found, known = svd_of_product(left, right), svd(left @ right)
    assert len(found.s) == min(m, n, r)
    torch.testing.assert_close(found.s, known.s)
    torch.testing.assert_close((found.U * found.s) @ found.Vh, left @ right)
    torch.testing.assert_close(found.Vh @ found.Vh.T, torch.eye(len(found.s)), rtol=0, atol=1e-5)
    assert len(svd_of_product(left, right, 2).s) == min(2, m, n, r)
    twice = svd_of_product(torch.cat([left, left], 1), torch.cat([right, right]))  # its numerical rank is no larger
    assert len(twice.s) == min(m, n, r)


# ── experts that are adapters ─────────────────────────────────────────────────────────────────────────────────────────


def adapter(folder, base, rank=3, seed=0, **config):
    """An adapter of ``a.weight`` that replaces ``head.weight``."""
    folder.mkdir()
    m, n = base.spec("a.weight").shape
    stored = {
        "base_model.model.a.lora_A.weight": drawn(rank, n, seed=seed),
        "base_model.model.a.lora_B.weight": drawn(m, rank, seed=seed + 1),
        "base_model.model.head.weight": drawn(*base.spec("head.weight").shape, seed=seed + 2),
    }
    safetensors.torch.save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "modules_to_save": ["head"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return open_lora(folder, base)


@pytest.fixture
def base():
    shapes = {"a.weight": (300, 260), "a.bias": (300,), "head.weight": (6, 300), "other.weight": (6, 6)}
    return Memory({name: drawn(*shape, seed=9) for name, shape in shapes.items()}, "<base>")


def no_matrix_is_decomposed(monkeypatch):
    def refuse(*_):
        raise AssertionError("decomposed a dense matrix")

    monkeypatch.setattr(_lowrank, "sketched", refuse)


def test_an_adapter_gives_its_factors_and_the_dense_matrix_is_never_decomposed(tmp_path, base, monkeypatch):
    lora = adapter(tmp_path / "l", base)
    known = svd(lora.read("a.weight") - base.read("a.weight"), most=3)
    no_matrix_is_decomposed(monkeypatch)
    assert most_directions(base, lora, "a.weight") == 3
    assert most_directions(base, lora, "other.weight") == 0
    found = change(base, "l", lora, "a.weight", 8)
    torch.testing.assert_close(found.s, known.s)
    torch.testing.assert_close((found.U * found.s) @ found.Vh, (known.U * known.s) @ known.Vh, rtol=0, atol=1e-4)
    assert len(change(base, "l", lora, "a.weight", 2).s) == 2
    assert len(change(base, "l", lora, "other.weight", 8).s) == 0


def test_what_an_adapter_replaces_and_an_adapter_over_another_base_are_decomposed_whole(tmp_path, base):
    lora = adapter(tmp_path / "l", base)
    assert most_directions(base, lora, "head.weight") == 6
    delta = lora.read("head.weight") - base.read("head.weight")
    found = change(base, "l", lora, "head.weight", 6)
    torch.testing.assert_close((found.U * found.s) @ found.Vh, delta)
    other = Memory({name: base.read(name) + 1 for name in base.specs})
    assert most_directions(other, lora, "a.weight") == 260
    assert len(change(other, "l", lora, "a.weight", 8).s) == 4  # the adapter's, and that of the ones


@pytest.mark.parametrize(
    "view",
    [
        lambda c: Cast(c, torch.float64),
        lambda c: Select(c, "*.weight"),
        lambda c: Overlay(c, Memory({"x": torch.ones(1)})),
        lambda c: Rename(Rename(c, {"a.weight": "b"}), {"b": "a.weight"}),
        Hashed,
    ],
)
def test_views_over_an_adapter_hand_its_factors_on(view, tmp_path, base, monkeypatch):
    lora = adapter(tmp_path / "l", base)
    no_matrix_is_decomposed(monkeypatch)
    assert most_directions(view(base), view(lora), "a.weight") == 3
    found = change(view(base), "l", view(lora), "a.weight", 8)
    torch.testing.assert_close(found.s.float(), change(base, "l", lora, "a.weight", 8).s)


def test_one_that_lies_over_the_adapters_tensor_does_not_hand_it_on(tmp_path, base):
    covered = Overlay(adapter(tmp_path / "l", base), Memory({"a.weight": base.read("a.weight") + 1}))
    assert covered.thin("a.weight") is None
    assert most_directions(base, covered, "a.weight") == 260


def test_an_adapter_of_transposed_weights(tmp_path, base):
    turned = Memory({n: base.read(n).T.contiguous() if n == "a.weight" else base.read(n) for n in base.specs})
    folder = tmp_path / "l"
    adapter(folder, base)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lora = open_lora(folder, turned)
    start, left, right = lora.thin("a.weight")
    torch.testing.assert_close(start + left @ right, lora.read("a.weight"))


def test_an_adapter_with_a_nan_is_refused_by_name(tmp_path, base):
    lora = adapter(tmp_path / "l", base)
    sick = Memory({name: torch.full(spec.shape, torch.nan) for name, spec in lora._adapter.file.specs.items()}, "<sick>")
    lora._adapter.file = sick
    with pytest.raises(NonFiniteError, match=r"expert 'l' .*'a\.weight'"):
        change(base, "l", lora, "a.weight", 8)


# ── the checkpoint of all factors ─────────────────────────────────────────────────────────────────────────────────────


def factors_of(base, experts, directions=4, rank=2):
    layers = {"a.": Layer("a.weight", "a.bias", directions, rank), "head.": Layer("head.weight", None, directions, rank)}
    return Factors(base, experts, layers)


def moved(base, seed):
    return Memory({name: base.read(name) + drawn(*spec.shape, seed=seed) for name, spec in base.specs.items()})


def test_its_tensors_are_those_of_the_layers_and_of_the_sizes_that_it_says(base):
    experts = {"x": moved(base, 1), "y": moved(base, 2), "same": base}
    found = factors_of(base, experts)
    assert {name: spec.shape for name, spec in found.specs.items()} == {
        **{"a.right": (3, 4, 260), "a.left": (300, 3, 2), "a.shift": (3, 300)},
        **{"head.right": (3, 4, 300), "head.left": (6, 3, 2)},
    }
    assert all(found.read(name).shape == spec.shape for name, spec in found.specs.items())
    for at, expert in enumerate(experts.values()):
        known = svd(expert.read("a.weight") - base.read("a.weight"), most=4)
        product = found.read("a.left")[:, at] @ found.read("a.right")[at, :2]
        if expert is base:
            assert not product.any()
            continue
        best = torch.linalg.svdvals(expert.read("a.weight") - base.read("a.weight"))[2:].norm()
        assert (expert.read("a.weight") - base.read("a.weight") - product).norm() <= 1.01 * best
        assert len(known.s) == 4
        torch.testing.assert_close(found.read("a.shift")[at], expert.read("a.bias") - base.read("a.bias"))
    flat = found.read("a.right").flatten()
    assert torch.equal(found.read_flat("a.right", 7, 900), flat[7:900])
    half = factors_of(Cast(base, torch.bfloat16), {n: Cast(e, torch.bfloat16) for n, e in experts.items()})
    assert {spec.dtype for spec in half.specs.values()} == {torch.bfloat16}
    assert half.read("a.left").dtype == torch.bfloat16


def test_a_layer_is_decomposed_once_by_however_many_threads_and_few_are_held(base, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args[3])
        return change(*args)

    monkeypatch.setattr(_lowrank, "change", counted)
    found = factors_of(base, {"x": moved(base, 1), "y": moved(base, 2)})
    read = []
    threads = [threading.Thread(target=lambda key=key: read.append(found.read(key))) for key in 3 * ["a.right", "a.left"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 6
    assert calls == ["a.weight", "a.weight"]
    found.read("head.left")
    found.read("a.left")
    assert calls[2:] == ["head.weight", "head.weight"]
    monkeypatch.setattr(_lowrank, "HELD", 1)
    found = factors_of(base, {"x": moved(base, 1)})
    for name in ("head.left", "head.right", "a.right", "head.left"):
        found.read(name)
    assert calls[4:] == ["head.weight", "a.weight", "head.weight"]
