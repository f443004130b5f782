"""LoRA from full fine-tunes: the best approximation, how much it leaves out, and a folder that applies to the base."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tests.merge.conftest import write_model

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.lora import open_lora
from eutectic.errors import EutecticError
from eutectic.merge.extract import extract, save_extracted

SHAPES = {"a.weight": (40, 30), "b.weight": (30, 50), "still.weight": (8, 8), "a.bias": (40,), "embed.weight": (20, 30)}


def made(spectrum=lambda i: 0.7**i, dtype=torch.float32):
    """A base, and a fine-tune whose matrices changed with a spectrum; the change of ``still`` is zero."""
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    tuned = dict(base)
    for name in ("a.weight", "b.weight"):
        m, n = SHAPES[name]
        U, V = (torch.linalg.qr(torch.randn(k, min(m, n), generator=random, dtype=torch.float64))[0] for k in (m, n))
        s = torch.tensor([spectrum(i) for i in range(min(m, n))]).double()
        tuned[name] = (base[name].double() + (U * s) @ V.T).float()
    tuned["a.bias"], tuned["embed.weight"] = base["a.bias"] + 0.1, base["embed.weight"] - 0.01
    return [Memory({n: t.to(dtype) for n, t in x.items()}, label) for x, label in ((base, "base"), (tuned, "tuned"))]


def squares(base, tuned, names):
    return math.fsum(float((tuned.read(name).double() - base.read(name).double()).square().sum()) for name in names)


def test_a_rank_is_the_best_approximation(tmp_path):
    base, tuned = made()
    found = extract(base, tuned, rank=4)
    assert found.ranks == {"a.weight": 4, "b.weight": 4}
    lora = open_lora(save_extracted(found, base, tuned, tmp_path / "out"), base)
    left = []
    for name in found.ranks:
        delta = tuned.read(name).double() - base.read(name).double()
        s = torch.linalg.svdvals(delta)
        lost = (lora.read(name).double() - tuned.read(name).double()).norm()
        assert float(lost) == pytest.approx(float(s[4:].norm()), rel=1e-3)
        left.append(s)
    for rank, error in found.errors.items():
        lost = math.fsum(float(s[rank:].square().sum()) for s in left)
        assert error == pytest.approx(math.sqrt(lost / squares(base, tuned, found.ranks)), rel=1e-3)
    assert list(found.errors) == [0, 1, 2, 4]
    others = squares(base, tuned, ["a.bias", "embed.weight"])
    assert found.rest == pytest.approx(others / (others + squares(base, tuned, found.ranks)), rel=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_is_met_by_the_fewest_directions(energy):
    base, tuned = made(lambda i: 0.9**i)
    found = extract(base, tuned, energy=energy)
    for name, rank in found.ranks.items():
        held = torch.linalg.svdvals(tuned.read(name).double() - base.read(name).double()).square().cumsum(0)
        assert rank == int((held / held[-1] < energy).sum()) + 1


def test_an_adapter_is_extracted_as_it_was():
    """A change of rank 2 has rank 2, and comes back whole."""
    base, tuned = made(lambda i: float(i < 2))
    found = extract(base, tuned, energy=0.9999)
    assert found.ranks == {"a.weight": 2, "b.weight": 2}
    assert found.errors[2] < 1e-3


def test_inputs_first(tmp_path):
    base, tuned = made()
    flipped = [Memory({n: c.read(n).T if c.read(n).ndim == 2 else c.read(n) for n in c.specs}, c.origin) for c in (base, tuned)]
    found = extract(*flipped, rank=30, fan_in_fan_out=True)
    lora = open_lora(save_extracted(found, *flipped, tmp_path / "out", fan_in_fan_out=True), flipped[0])
    torch.testing.assert_close(lora.read("b.weight"), tuned.read("b.weight").T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either a rank or an energy"),
        ({"rank": 1, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank = 0"),
        ({"energy": 0.0}, "energy = 0.0"),
        ({"energy": 1.5}, "energy = 1.5"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(EutecticError, match=says):
        extract(*made(), **options)


def test_bad_models():
    base, tuned = made()
    with pytest.raises(EutecticError, match="base changed no matrix of base"):
        extract(base, base, rank=2)
    sick = Memory({**{n: tuned.read(n) for n in tuned.specs}, "a.weight": torch.full((40, 30), torch.nan)}, "sick")
    with pytest.raises(EutecticError, match="sick.*NaN or Inf in 'a.weight'"):
        extract(base, sick, rank=2)
    with pytest.raises(EutecticError, match="do(es)? not fit"):
        extract(base, Memory({"a.weight": torch.ones(40, 30)}, "small"), rank=2)


def test_the_command(tmp_path, run):
    folders = []
    for checkpoint in made():
        tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
        folders.append(write_model(tmp_path / checkpoint.origin, tensors))
    status, out, err = run("extract", *folders, tmp_path / "out", "--rank", 2)
    assert status == 0, err
    assert "rank     2  leaves out" in out
    assert "2 matrices; other tensors" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, "../base")
    assert run("diff", folders[1], tmp_path / "out")[0] == 1
    assert run("extract", *folders, tmp_path / "out", "--rank", 2)[0] == 2
