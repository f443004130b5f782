"""What ``--compat mergekit`` changes, in numbers: fractions of a tensor, the base_model of methods that need none."""

from __future__ import annotations

import json

import pytest
import torch
from tests.merge.conftest import write_model

from eutectic.errors import ParameterError
from eutectic.merge.mergekit import parse_mergekit

NAME, BIAS = "model.layers.0.w.weight", "model.layers.1.w.bias"


@pytest.fixture
def models(tmp_path):
    """State dicts of a base and two fine-tunes, in folders; the tensors have 77 and 11 entries."""
    random = torch.Generator().manual_seed(0)
    shapes = {NAME: (11, 7), BIAS: (11,)}
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    found = {"base": base}
    for name in "ab":
        found[name] = {key: tensor + torch.randn(tensor.shape, generator=random) for key, tensor in base.items()}
    for name, tensors in found.items():
        write_model(tmp_path / name, tensors, config=False)
    return found


@pytest.fixture
def opened(models, tmp_path):
    """A function that opens a recipe beside the models."""

    def open_recipe(text, compat=True):
        return parse_mergekit(text, "mk.yaml", compat).open(tmp_path)

    return open_recipe


def recipe(method, given, names="a"):
    listed = ", ".join(f"{{model: {name}}}" for name in names)
    return f"merge_method: {method}\nbase_model: base\nmodels: [{listed}]\nparameters: {{{given}}}\n"


def changed(composed, models, name=NAME):
    return int((composed.read(name) != models["base"][name]).sum())


@pytest.mark.parametrize(
    ("given", "theirs", "ours"),
    [
        ("density: 0.33", 25, 25),  # of 77 entries 25.41
        ("density: 0.34", 26, 26),  # 26.18
        ("density: 0.35", 26, 27),  # 26.95
        ("density: 1", 77, 77),
    ],
)
def test_fractions_are_rounded_down(opened, models, given, theirs, ours):
    for method, more in (("ties", ""), ("breadcrumbs", ", gamma: 0.04"), ("breadcrumbs_ties", ", gamma: 0.04")):
        if more and given == "density: 1":
            continue
        text = recipe(method, f"weight: 1, {given}{more}")
        assert changed(opened(text), models) == theirs
        assert changed(opened(text, compat=False), models) == ours
    text = recipe("sce", given.replace("density", "select_topk"), names="ab")
    assert changed(opened(text), models) == theirs
    assert changed(opened(text, compat=False), models) == ours


def test_less_than_one_entry_is_one_for_ties_alone(opened, models):
    assert changed(opened(recipe("ties", "weight: 1, density: 0.01")), models) == 1
    assert changed(opened(recipe("breadcrumbs", "weight: 1, density: 0.01")), models) == 0
    assert changed(opened(recipe("sce", "select_topk: 0.01", names="ab")), models) == 0


@pytest.mark.parametrize("value", ["foo", "-0.5", "1.5"])
@pytest.mark.parametrize("given", ["weight: 1, density: {}", "weight: 1, gamma: {}", "select_topk: {}"])
def test_what_is_no_fraction_is_refused(opened, given, value):
    method = "sce" if "topk" in given else "breadcrumbs"
    with pytest.raises(ParameterError, match=r"mk\.yaml:4: "):
        opened(recipe(method, given.format(value), names="ab"))


def test_a_gamma_that_does_not_fit_is_lowered_by_entries(opened, models):
    composed = opened(recipe("breadcrumbs", "weight: 1, density: 0.9, gamma: 0.5"))
    for name, n in ((NAME, 77), (BIAS, 11)):
        order = (models["a"][name] - models["base"][name]).abs().flatten().argsort(descending=True)
        kept = (composed.read(name) != models["base"][name]).flatten()
        assert kept[order].tolist() == [False] * (n - int(0.9 * n)) + [True] * int(0.9 * n)


def test_a_gamma_that_is_lowered_for_one_model_only_is_refused(opened):
    text = recipe("breadcrumbs", "weight: 1, density: 0.5, gamma: 0.2", names="ab")
    opened(text).close()
    with pytest.raises(ParameterError, match="'gamma' must be the same"):
        opened(text.replace("{model: a}", "{model: a, parameters: {density: 0.95}}"))


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_that_is_not_listed_is_a_member(opened, models, method):
    text = recipe(method, "weight: 0.5" if method == "linear" else "", names="ab")
    listed = text.replace("[{model: a}", "[{model: base}, {model: a}")
    assert torch.equal(opened(text).read(NAME), opened(listed).read(NAME))
    plain = opened(text, compat=False)
    assert torch.equal(plain.read(NAME), opened(text.replace("base_model: base\n", "")).read(NAME))
    assert any("mk.yaml:2: " in note and "base is left out" in note for note in plain.notes)
    sliced = text.replace("models:", "slices:\n  - sources:").replace("}, {", ", layer_range: [0, 2]}, {")
    sliced = sliced.replace("b}]", "b, layer_range: [0, 2]}]")
    assert torch.equal(opened(sliced).read(NAME), plain.read(NAME))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("columns", "along"), [("false", "rows"), ("true", "columns")])
def test_nuslerp_along_one_axis(opened, models, base, columns, along):
    text = recipe("nuslerp", f"weight: 1, nuslerp_flatten: false, nuslerp_row_wise: {columns}", names="ab")
    composed = opened(text if base else text.replace("base_model: base\n", ""), compat=False)
    (merged,) = composed.merges
    assert merged.method == f"nuslerp_{along}{'_delta' if base else ''}"
    assert json.loads(merged._keys[NAME])["weights"] == [1, 1]
    assert torch.isfinite(composed.read(NAME)).all()


def test_details_of_sce(opened):
    for compat in (True, False):
        (merged,) = opened(recipe("sce", "", names="ab"), compat=compat).merges
        found = json.loads(merged._keys[NAME])
        assert (found["balanced"], found["count"]) == (("positive", "down") if compat else ("base", "nearest"))
