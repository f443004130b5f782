"""Saving: a folder appears whole, with all that belongs to it, or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import namedtuple

import pytest
import safetensors.torch
import torch
from tests.merge.conftest import tensors, write_model

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.hashed import fingerprint
from eutectic.errors import DiskFullError, LayoutError, NonFiniteError, OutputError
from eutectic.merge import api
from eutectic.merge.recipe import Recipe, parse
from eutectic.merge.run import merged_from, save, verify


def provenance(folder):
    return json.loads((folder / "eutectic.json").read_text())


def ties(models, **options):
    return api.merge("ties", models / "base", {"a": models / "a", "b": models / "b"}, **options)


# ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_appears_with_all_that_belongs_to_it(models, tmp_path):
    out = save(ties(models), tmp_path / "deep" / "out")
    assert out == tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "eutectic.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "base"}
    found = safetensors.torch.load_file(out / "model.safetensors")
    wanted = api.state_dict(ties(models))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_shards(models, tmp_path):
    out = save(ties(models), tmp_path / "out", max_shard_bytes=150)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert all(torch.equal(api.open(out).read(name), tensor) for name, tensor in api.state_dict(ties(models)).items())


def test_the_config_says_the_dtype(models, tmp_path):
    out = save(ties(models, dtype=torch.bfloat16), tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == {"model_type": "toy", "dtype": "bfloat16", "hidden": 6}


def test_provenance(models, tmp_path):
    merged = ties(models, density=0.4)
    found = provenance(save(merged, tmp_path / "out"))
    recipe = Recipe(**found["recipe"])
    assert recipe.sha256() == found["recipe_sha256"]
    assert (recipe.method, recipe.parameters["density"], list(recipe.experts)) == ("ties", 0.4, ["a", "b"])
    assert list(found["inputs"]) == ["base", "experts.a", "experts.b"]
    for name, about in found["inputs"].items():
        assert about["blake3"] == fingerprint(api.open(models / name.removeprefix("experts.")))
    assert {"eutectic", "torch", "python"} <= found["versions"].keys()


def test_a_recipe_of_ones_own_is_the_recorded_one(models, tmp_path):
    recipe = parse("method: ties\nbase: base\nexperts: {a: a, b: b}\ndtype: float16")
    out = save(merged_from(recipe, models), tmp_path / "out", recipe=recipe)
    assert provenance(out)["recipe_sha256"] == recipe.sha256()
    text = re.search(r"```yaml\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    assert parse(text).sha256() == recipe.sha256()


def test_the_card_keeps_the_order_of_the_experts(models, tmp_path):
    recipe = parse("method: average\nexperts: {b: b, a: a}\nparameters: {weights: [1, 2]}")
    out = save(merged_from(recipe, models), tmp_path / "out", recipe=recipe)
    text = re.search(r"```yaml\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    assert list(parse(text).experts) == ["b", "a"]


def test_the_recorded_recipe_makes_the_same_model_again(models, tmp_path):
    merged = api.merge(
        "task_arithmetic", "base", {"b": "b", "a": "a"}, scale=0.5, weights=[1, -1], dtype=torch.float16
    )  # relative paths, from the current folder
    out = save(merged, tmp_path / "out")
    again = save(merged_from(Recipe(**provenance(out)["recipe"]), models), tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_seed_of_the_recipe_is_the_seed_of_the_method(models):
    text = "method: dare\nbase: base\nexperts: {a: a, b: b}\n"
    by_recipe, by_method, zero = (
        merged_from(parse(text + line), models).read("layer.0.weight") for line in ("seed: 5", "parameters: {seed: 5}", "")
    )
    assert torch.equal(by_recipe, by_method)
    assert not torch.equal(by_recipe, zero)


def test_an_expert_may_be_called_base(models, tmp_path):
    merged = api.merge("ties", models / "base", {"base": models / "a", "b": models / "b"})
    found = provenance(save(merged, tmp_path / "out"))
    prints = [about["blake3"] for about in found["inputs"].values()]
    assert prints == [fingerprint(api.open(models / name)) for name in ("base", "a", "b")]
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "base"}


def test_any_checkpoint_can_be_saved(tmp_path):
    out = save(Memory(tensors()), tmp_path / "out")
    assert {name: t.tolist() for name, t in api.state_dict(out).items()} == {n: t.tolist() for n, t in tensors().items()}
    assert "recipe" not in provenance(out)


def test_models_in_memory_take_nothing_from_a_folder_of_that_name(tmp_path, monkeypatch):
    write_model(tmp_path / "memory", tensors())
    monkeypatch.chdir(tmp_path)
    out = save(api.merge("average", None, [tensors(1), tensors(2)]), tmp_path / "out")
    assert not (out / "config.json").exists()


def test_a_merge_of_merges_keeps_the_config(models, tmp_path):
    inner = [ties(models), ties(models, density=0.5)]
    out = save(api.merge("average", None, inner), tmp_path / "out")
    assert (out / "config.json").exists()


def test_single_files_may_lie_beside_the_output(tmp_path):
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        safetensors.torch.save_file(tensors(seed), tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b")}
    out = save(api.merge("ties", tmp_path / "base.safetensors", paths), tmp_path / "out")
    assert (out / "model.safetensors").exists()


# ── what is refused, and what is left: nothing ────────────────────────────────────────────────────────────────────────


def test_an_output_that_exists_is_not_touched(models, tmp_path, listing):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    before = listing()
    with pytest.raises(OutputError, match="out: exists already"):
        save(ties(models), tmp_path / "out")
    with pytest.raises(OutputError, match=r"mine: exists already"):
        save(ties(models), tmp_path / "out" / "mine")
    assert listing() == before


def test_a_replaced_output_keeps_nothing_stale(models, tmp_path):
    out = save(ties(models), tmp_path / "out", max_shard_bytes=150)
    (out / "mine").write_text("stale")
    save(ties(models), out, replace=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "eutectic.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]


def test_inputs_are_never_replaced(models, listing):
    before = listing()
    for target in (models / "a", models / "base", models, models / "a" / "new"):
        with pytest.raises(OutputError, match="input"):
            save(ties(models), target, replace=True)
    nested = api.merge("average", None, [api.merge("average", None, [models / "a"]), ties(models)])
    for target in (models / "a", models / "base"):
        with pytest.raises(OutputError, match="input"):
            save(nested, target, replace=True)
    assert listing() == before


class Failing(Memory):
    """A checkpoint whose last tensor cannot be read."""

    def __init__(self, model, error):
        super().__init__(model)
        self.error = error

    def _read(self, name, start, stop):
        if name == "layer.1.weight":
            raise self.error
        return super()._read(name, start, stop)


@pytest.mark.parametrize("error", [RuntimeError("half way"), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_half_way_leaves_nothing(models, tmp_path, listing, error, existing):
    if existing:
        save(ties(models), tmp_path / "new" / "out")
    before = listing()
    merged = api.merge("task_arithmetic", models / "base", [Failing(tensors(1), error)])
    with pytest.raises(type(error)) as caught:
        save(merged, tmp_path / "new" / "out", replace=existing)
    assert caught.value is error
    assert listing() == before


def test_a_stopped_save_is_not_carried_on_with_other_weights_in_memory(models, tmp_path):
    def stop(what, done, total):
        if what == "merging" and 0 < done < total:
            raise KeyboardInterrupt

    def merged(seed):
        return api.merge("task_arithmetic", models / "base", {"x": tensors(seed)})

    with pytest.raises(KeyboardInterrupt):
        save(merged(1), tmp_path / "out", progress=stop)
    save(merged(2), tmp_path / "out")
    wanted = api.state_dict(merged(2))
    found = api.state_dict(tmp_path / "out")
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_a_nan_leaves_nothing(models, tmp_path, listing):
    before = listing()
    broken = tensors(1)
    broken["layer.1.weight"][2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"expert 'x' .*'layer\.1\.weight'"):
        save(api.merge("ties", models / "base", {"x": broken}), tmp_path / "out")
    assert listing() == before


def test_a_disk_that_is_too_small_leaves_nothing(models, tmp_path, listing, monkeypatch):
    before = listing()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(DiskFullError, match=r"out.*no room.*10 are free"):
        save(ties(models), tmp_path / "out")
    assert listing() == before


def test_a_disk_that_fills_up_leaves_nothing(models, tmp_path, listing, monkeypatch):
    before = listing()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFullError, match="no room"):
        save(ties(models), tmp_path / "out")
    assert listing() == before


def test_a_layout_that_does_not_fit_leaves_nothing(models, tmp_path, listing):
    write_model(models / "odd", tensors(1) | {"extra": torch.zeros(3)})
    before = listing()
    with pytest.raises(LayoutError, match="extra"):
        save(api.merge("ties", models / "base", {"odd": models / "odd"}), tmp_path / "out")
    assert listing() == before


def test_progress_ends_at_the_end(models, tmp_path):
    steps = []
    save(ties(models), tmp_path / "out", progress=lambda what, done, total: steps.append((what, done, total)))
    merging = [(done, total) for what, done, total in steps if what == "merging"]
    assert merging[-1][0] == merging[-1][1] == 60 * 4 + 5 * 8
    assert merging == sorted(merging)


def test_repair_takes_what_is_not_finite_from_the_base_and_counts_it(tmp_path):
    base = {"w": torch.arange(6.0), "v": torch.ones(3)}
    a, b = ({key: value + 1 for key, value in base.items()} for _ in range(2))
    a["w"][1], a["w"][4], b["w"][4] = float("nan"), float("inf"), float("-inf")
    base["v"][0] = float("nan")
    merged = api.merge("ties", base, {"a": a, "b": b}, density=1.0)
    with pytest.raises(NonFiniteError):
        save(merged, tmp_path / "refused")
    out = save(merged, tmp_path / "out", repair=True)
    found = api.open(out)
    assert torch.equal(found.read("w"), torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 6.0]))
    assert torch.equal(found.read("v"), torch.full((3,), 2.0))
    about = json.loads((out / "eutectic.json").read_text())
    assert about["repaired"] == {"base": {"v": 1}, "experts.a": {"w": 2}, "experts.b": {"w": 1}}
    assert about["norms"]["w"] == pytest.approx(found.read("w").norm().item())
    assert verify(out) == []
