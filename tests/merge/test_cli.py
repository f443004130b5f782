"""The command line: what it prints, and one clear message with exit status 2 for everything that it refuses."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from tests.merge.conftest import tensors, write_model

from eutectic import registry
from eutectic.merge import api
from eutectic.merge.recipe import load

RECIPE = "method: ties\nbase: base\nexperts: {a: a, b: b}\nparameters: {density: 0.5}\n"


@pytest.fixture
def recipe(models):
    """A function that writes a recipe beside the models."""

    def write(text=RECIPE):
        path = models / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def refused(run, listing):
    """A function that runs a command that must be refused: status 2, one message, no traceback, nothing left behind."""

    def command(*arguments):
        before = listing()
        status, out, err = run(*arguments)
        assert status == 2, err
        assert len(re.findall(r"^error: ", err, re.MULTILINE)) == 1
        assert "Traceback" not in out + err
        assert out == ""
        assert listing() == before
        return err[err.index("error: ") :]

    return command


# ── merge ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merge(run, recipe, models, tmp_path):
    status, out, err = run("merge", recipe(), tmp_path / "out")
    assert (status, out) == (0, f"{tmp_path / 'out'}: ties of 2 expert(s)\n"), err
    wanted = api.state_dict(api.merge("ties", models / "base", {"a": models / "a", "b": models / "b"}, density=0.5))
    found = api.state_dict(tmp_path / "out")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert load(recipe()).sha256() in (tmp_path / "out" / "eutectic.json").read_text()


def test_paths_are_relative_to_the_recipe(run, recipe, tmp_path, monkeypatch):
    path = recipe()
    monkeypatch.chdir(tmp_path)
    assert run("merge", path, "out")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_one_expert_gets_a_note(run, recipe, tmp_path):
    status, _, err = run("merge", recipe("method: average\nexperts: {a: a}"), tmp_path / "out")
    assert status == 0
    assert "note: one expert only" in err
    assert all(torch.equal(tensor, tensors(1)[name]) for name, tensor in api.state_dict(tmp_path / "out").items())


def test_force_replaces(run, recipe, tmp_path):
    assert run("merge", recipe(), tmp_path / "out")[0] == 0
    assert run("merge", recipe(), tmp_path / "out", "--force")[0] == 0


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def spoil(models, name, **changes):
    write_model(models / name, tensors(1) | {key.replace("__", "."): tensor for key, tensor in changes.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer__0__bias": torch.zeros(7)}, ["'odd'", "layer.0.bias", "[7] F32", "[6] F32"]),
        ({"extra": torch.zeros(7)}, ["'odd'", "extra", "only in"]),
        ({"layer__0__bias": torch.zeros(6).half()}, ["'odd'", "layer.0.bias", "F16", "`dtype:`"]),
        ({"layer__0__bias": torch.tensor([0, 0, 0, 0, 0, float("nan")])}, ["'odd'", "layer.0.bias", "NaN"]),
        ({"layer__0__bias": torch.tensor([0, 0, 0, 0, 0, float("inf")])}, ["'odd'", "layer.0.bias", "Inf"]),
    ],
    ids=["shape", "name", "dtype", "NaN", "Inf"],
)
def test_experts_that_do_not_fit(refused, recipe, models, tmp_path, change, says):
    spoil(models, "odd", **change)
    path = recipe("method: ties\nbase: base\nexperts: {a: a, odd: odd}\n")
    message = refused("merge", path, tmp_path / "out")
    for words in says:
        assert words in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method: ties\nbase: base\nexperts: []", ["no experts", "ties"]),
        ("method: ties\nbase: base", ["no experts", "ties"]),
        ("method: slerp\nexperts: [a]", ["slerp", "exactly 2", "got 1"]),
        ("method: ties\nexperts: [a, b]", ["ties", "`base`"]),
        ("method: ties\nbase: base\nexperts: [a]\nparameters:\n  density: 7", ["recipe.yaml:5:", "'density'", "less than"]),
        ("method: ties\nbase: base\nexperts: [a]\nparameters:\n  densty: 0", ["recipe.yaml:5:", "Did you mean 'density'?"]),
        ("method: tyes\nbase: base\nexperts: [a]", ["recipe.yaml:1:", "Did you mean 'ties'?"]),
        ("methd: ties", ["recipe.yaml:1:", "Did you mean 'method'?"]),
        ("method: dare\nbase: base\nexperts: [a]\nparameters: {density: 0}", ["density"]),
        ("method: average\nexperts: [a, b]\nparameters: {weights: [1, -1]}", ["weights", "sum to zero"]),
        ("method: average\nexperts: [a, b]\nparameters: {weights: [1]}", ["average", "exactly 1", "got 2"]),
        ("method: ties\nbase: nowhere\nexperts: [a]", ["nowhere", "no such"]),
        ("method: ties\nbase: base\nexperts: [a]\noverrides: [{match: 'x*', parameters: {}}]", ["'x*'", "matches no tensor"]),
        ("method: ties\nbase: base\nexperts: [a]\nsuite: nothing", ["nothing"]),
        ("[", ["recipe.yaml:1:", "not YAML"]),
    ],
)
def test_recipes_that_cannot_be(refused, recipe, tmp_path, text, says):
    path = recipe(text)
    for arguments in (("merge", path, tmp_path / "out"), ("plan", path)):
        message = refused(*arguments)
        for words in says:
            assert words in message


def test_overflow(refused, recipe, models, tmp_path):
    path = recipe("method: task_arithmetic\nbase: base\nexperts: [a]\nparameters: {scale: 1e9}\ndtype: float16")
    assert "overflows torch.float16" in refused("merge", path, tmp_path / "out")


def test_an_output_that_exists(refused, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    message = refused("merge", recipe(), tmp_path / "out")
    assert f"{tmp_path / 'out'}: exists already" in message
    assert "--force" in message


def test_an_output_that_is_an_input(refused, recipe, models):
    assert "input" in refused("merge", recipe(), models / "a", "--force")


def test_a_full_disk(refused, recipe, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
        assert "no room" in refused("merge", recipe(), tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert "no room" in refused("merge", recipe(), tmp_path / "out")


def test_a_recipe_that_is_not_there(refused, models, tmp_path):
    assert "missing.yaml: cannot be read" in refused("merge", "missing.yaml", tmp_path / "out")
    assert "missing.yaml: cannot be read" in refused("plan", "missing.yaml")


def test_unknown_methods_and_checkpoints(refused, models):
    assert "Did you mean 'ties'?" in refused("methods", "tyes")
    assert "nowhere" in refused("diff", "base", "./nowhere")


def test_usage_errors_are_status_2(run, models):
    for arguments in (("merge",), ("mergee", "x"), ("plan", "--nonsense", "x")):
        status, _, err = run(*arguments)
        assert status == 2
        assert "Traceback" not in err


# ── plan, methods, diff ───────────────────────────────────────────────────────────────────────────────────────────────


def test_plan(run, recipe, models, listing):
    path = recipe()
    before = listing()
    status, out, _ = run("plan", path)
    assert status == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if "  " in line)
    assert lines["method"].startswith("ties {'density': 0.5")
    assert lines["experts"] == "a, b"
    assert lines["tensors"] == "4, of them merged 3; 65 parameters"
    assert lines["passes"] == "3"
    assert {"read", "write"} <= lines.keys()
    assert "peak memory" in out
    assert listing() == before


def test_methods_lists_every_method(run):
    status, out, _ = run("methods")
    assert status == 0
    listed = [line.split()[0] for line in out.splitlines()]
    assert listed == [name for room in registry.ROOMS for name in registry.names(room)]
    assert all(line.rstrip().endswith(".") for line in out.splitlines())


@pytest.mark.parametrize("name", list(registry.names("methods")))
def test_methods_explains_each(run, name):
    status, out, _ = run("methods", name)
    assert status == 0
    assert out.startswith(f"{name}(")
    assert "Source:" in out


def test_methods_ties(run):
    _, out, _ = run("methods", "ties")
    assert "arXiv:2306.01708" in out
    assert re.search(r"^  density: .*maximum 1.*minimum 0", out, re.MULTILINE)
    assert re.search(r"^  over: .*'tensor', 'model'", out, re.MULTILINE)


def test_diff(run, models):
    assert run("diff", "base", "base")[:2] == (0, "no difference\n")
    status, out, _ = run("diff", "base", "a")
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines()] == ["layer.0.bias", "layer.0.weight", "layer.1.weight"]
    assert all("‖Δ‖" in line for line in out.splitlines())


def test_in_a_process_of_its_own(recipe, tmp_path):
    code = "from eutectic.cli import main; main()"
    command = [sys.executable, "-c", code, "merge", str(recipe()), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}: ties of 2 expert(s)\n"), done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.strip().startswith("error: ")
    assert len(again.stderr.strip().splitlines()) == 1
