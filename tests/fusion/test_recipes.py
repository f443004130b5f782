"""Recipes of fitted methods on the command line: fuse, apply again, interrupt, refuse."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eutectic import cli, errors, registry
from eutectic.bench import zoo
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.hashed import fingerprint
from eutectic.fusion import _fit
from eutectic.fusion._folder import layers_of
from eutectic.merge.recipe import load

RECIPE = "method: {method}\nsuite: mini\nexperts: [digits8, letters]\nparameters: {{{parameters}}}\n"


@pytest.fixture
def recipe(tmp_path):
    def write(method="adamerging", parameters="steps: 2, batch_size: 2", name="recipe.yaml", text=RECIPE, more=""):
        path = tmp_path / name
        path.write_text(text.format(method=method, parameters=parameters) + more)
        return path

    return write


def test_there_is_an_example_of_every_method():
    folder = Path(__file__).parent.parent.parent / "examples" / "fuse"
    assert {path.stem for path in folder.iterdir()} == set(registry.names("fusion"))
    for path in folder.iterdir():
        recipe = load(path)
        assert (recipe.method, recipe.suite) == (path.stem, "mini")


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("method", ["adamerging", "concrete_task_arithmetic", "wemoe", "e_wemoe", "smile", "smile_prototypes"])
def test_what_fuse_wrote_merge_writes_again_from_its_artefact(recipe, tmp_path, method):
    parameters = {"smile": "rank: 2, gate_rank: 2", "smile_prototypes": "rank: 2"}.get(method, "steps: 2, batch_size: 2")
    assert run("fuse", recipe(method, parameters), tmp_path / "out").exit_code == 0
    about = json.loads((tmp_path / "out" / "artefact" / "artefact.json").read_text())
    assert about["method"] == method
    assert about["protocol"] == "inductive"
    assert about["tasks"] == ["letters", "digits8"]  # in the suite's order
    assert not list(tmp_path.glob(".out*"))
    again = recipe(method, "", "again.yaml", RECIPE.replace("parameters: {{{parameters}}}\n", ""), "artefact: out\n")
    assert run("merge", again, tmp_path / "again").exit_code == 0
    assert fingerprint(open_folder(tmp_path / "again")) == fingerprint(open_folder(tmp_path / "out"))
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    suite = zoo.open_suite("mini")
    network = suite.backbone(open_folder(tmp_path / "out"), layers_of(tmp_path / "out"))
    assert network(torch.zeros(2, 3, 42, 42)).shape == (2, 384)


def test_an_interrupted_fit_is_carried_on_to_the_same_bits(recipe, tmp_path, monkeypatch):
    path = recipe(parameters="steps: 4, batch_size: 2")
    monkeypatch.setattr(_fit, "EVERY", 2)
    assert run("fuse", path, tmp_path / "whole").exit_code == 0
    backward, steps = _fit.backward, []

    def stopping(network, batches, step, loss, run):
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return backward(network, batches, step, loss, run)

    monkeypatch.setattr("eutectic.fusion._coefficients.backward", stopping)
    assert run("fuse", path, tmp_path / "out").exit_code != 0
    assert run("fuse", path, tmp_path / "out").exit_code == 0
    assert steps == [0, 1, 2, 3, 2, 3]
    assert fingerprint(open_folder(tmp_path / "out")) == fingerprint(open_folder(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("recipe_of", "command", "error", "says"),
    [
        ({"method": "adamergin"}, "fuse", errors.UnknownNameError, "Did you mean 'adamerging'"),
        ({"parameters": "stepps: 1"}, "fuse", errors.ParameterError, r"recipe.yaml:4: .*Did you mean 'steps'"),
        ({"method": "ties", "parameters": ""}, "fuse", errors.RecipeError, "`eutectic merge` runs"),
        ({}, "merge", errors.RecipeError, "`eutectic fuse` does so"),
        ({"more": "artefact: nowhere\n"}, "merge", errors.CheckpointError, "nowhere.artefact.json: no artefact"),
        ({"more": "artefact: nowhere\n"}, "fuse", errors.RecipeError, "fitted already"),
        ({"more": "dtype: bfloat16\n"}, "fuse", errors.RecipeError, "recipe.yaml:5: .*leave out `dtype`"),
        ({"method": "ties", "parameters": "", "more": "tasks: mini\n"}, "merge", errors.RecipeError, "leave out `tasks`"),
    ],
)
def test_what_cannot_be_fused_is_refused_and_nothing_is_left(recipe, tmp_path, recipe_of, command, error, says):
    path = recipe(**recipe_of)
    with pytest.raises(error, match=says):
        run(command, path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


BY_PATH = {
    "adamerging": "steps: 1, batch_size: 1",
    "concrete_task_arithmetic": "steps: 1, batch_size: 1",
    "wemoe": "steps: 1, batch_size: 1",
    "smile": "rank: 2, gate_rank: 2",
    "lorahub": "generations: 1, shots: 2",
}


@pytest.mark.parametrize("method", BY_PATH)
def test_adapters_by_path_with_the_tasks_of_a_suite(tmp_path, method):
    """Experts are PEFT folders over the base: every kind of method takes them as they are."""
    if method == "lorahub":
        pytest.importorskip("cma")
    mini, path = zoo.packaged(), tmp_path / "recipe.yaml"
    path.write_text(
        f"method: {method}\nbase: {mini / 'base'}\nexperts: {{letters: {mini / 'experts' / 'letters'}}}\n"
        f"tasks: mini\nparameters: {{{BY_PATH[method]}}}\n"
    )
    assert run("fuse", path, tmp_path / "out").exit_code == 0
    about = json.loads((tmp_path / "out" / "artefact" / "artefact.json").read_text())
    assert about["tasks"] == ["letters"]
    network = zoo.open_suite("mini").backbone(open_folder(tmp_path / "out"), layers_of(tmp_path / "out"))
    assert torch.isfinite(network(torch.zeros(2, 3, 42, 42))).all()


def test_an_artefact_for_all_preferences_is_merged_at_another_without_a_fit(recipe, tmp_path):
    first, more = RECIPE.replace("[digits8, letters]", "[letters, digits8]"), "steps: 2, batch_size: 2"
    assert run("fuse", recipe("pwe_moe", more, text=first), tmp_path / "out").exit_code == 0
    again = recipe("pwe_moe", "preference: [0.0, 1.0]", "again.yaml", first, "artefact: out\n")
    assert run("merge", again, tmp_path / "again").exit_code == 0
    assert json.loads((tmp_path / "again" / "eutectic.json").read_text())["recipe"]["parameters"]["preference"] == [0.0, 1.0]
    whole = recipe("pwe_moe", more + ", preference: {digits8: 1}", "whole.yaml", first)
    assert run("fuse", whole, tmp_path / "whole").exit_code == 0
    assert fingerprint(open_folder(tmp_path / "again")) == fingerprint(open_folder(tmp_path / "whole"))
    assert fingerprint(open_folder(tmp_path / "again")) != fingerprint(open_folder(tmp_path / "out"))
    for parameters, says in (
        ("preference: [0.2, 0.2]", "sum is 0.4, not 1"),
        ("preference: [1.5, -0.5]", "-0.5 is negative"),
        ("steps: 3", r"out: steps = 3, but the artefact was fitted with 2: leave it out"),
    ):
        with pytest.raises(errors.EutecticError, match=says):
            run("merge", recipe("pwe_moe", parameters, "bad.yaml", first, "artefact: out\n"), tmp_path / "bad")
