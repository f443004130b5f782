"""The public verbs that are not tested elsewhere: open, state_dict, diff."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.merge.conftest import tensors

import eutectic as eu
from eutectic.errors import CheckpointError
from eutectic.merge import api


def test_the_verbs_stay_verbs():
    # `eutectic.merge` is a room and a verb: whichever is imported first, the verb can be called, and called again
    code = """
import torch
{first}
import eutectic as eu
model = {{"w": torch.ones(2)}}
for _ in range(2):
    assert eu.state_dict(eu.merge("average", None, [model, model]))["w"].tolist() == [1, 1]
from eutectic import merge
from eutectic.merge.view import Merged
assert isinstance(merge("average", None, [model]), Merged)
assert isinstance(eu.merge("average", None, [model]), eu.Checkpoint)
"""
    for first in ("", "from eutectic.merge.recipe import parse"):
        done = subprocess.run([sys.executable, "-c", code.format(first=first)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{first!r}: {done.stderr}"


def test_what_can_be_opened(models):
    module = torch.nn.Linear(2, 3)
    opened = api.open("base")
    assert eu.open(opened) is opened
    for source in ("base", models / "base", models / "base" / "model.safetensors", tensors()):
        found = eu.state_dict(source)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in tensors().items()}
    live = eu.open(module)
    assert set(live.specs) == {"weight", "bias"}
    module.bias.data.fill_(7)
    assert live.read("bias").tolist() == [7, 7, 7]


def test_what_cannot_be_opened(models):
    for source, says in (
        (42, "int"),
        (None, "NoneType"),
        ("./missing", "no such"),
        (models / "base" / "config.json", "config"),
    ):
        with pytest.raises(CheckpointError, match=says):
            eu.open(source)


def test_a_state_dict_is_its_owners():
    model = tensors()
    found = eu.state_dict(model)
    for tensor in found.values():
        tensor.zero_()
    assert all(torch.equal(model[name], tensor) for name, tensor in tensors().items())


def test_diff():
    model = tensors()
    assert eu.diff(model, tensors()) == []
    other = tensors() | {"positions": torch.arange(5).flip(0), "new": torch.zeros(2)}
    other["layer.0.bias"] = model["layer.0.bias"] + 3
    other["layer.1.weight"] = torch.zeros(3)
    lines = {line.split(":")[0]: line for line in eu.diff(model, other)}
    assert set(lines) == {"layer.0.bias", "layer.1.weight", "positions", "new"}
    assert "only on the right" in lines["new"]
    assert "[4, 6] F32 against [3] F32" in lines["layer.1.weight"]
    assert "4 elements differ" in lines["positions"]
    assert "‖Δ‖ = 7.348" in lines["layer.0.bias"]  # 3·√6
