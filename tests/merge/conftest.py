"""Small model folders, and the command line run in this process."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.save import save_tensors
from eutectic.cli import main


def tensors(seed=None, dtype=torch.float32):
    """A base, or with a seed one of its fine-tunes."""
    random = torch.Generator().manual_seed(0)
    model = {
        "layer.0.weight": torch.randn(6, 5, generator=random),
        "layer.0.bias": torch.randn(6, generator=random),
        "layer.1.weight": torch.randn(4, 6, generator=random),
    }
    if seed is not None:
        random.manual_seed(seed)
        model = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=random) for name, tensor in model.items()}
    return {name: tensor.to(dtype) for name, tensor in model.items()} | {"positions": torch.arange(5)}


def write_model(folder, model, config=True):
    folder.mkdir(parents=True)
    save_tensors(Memory(model), folder)
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "toy", "dtype": "float32", "hidden": 6}))
        (folder / "tokenizer.json").write_text(json.dumps({"of": folder.name}))
    return folder


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with the models ``base``, ``a`` and ``b``; it is the current folder too."""
    folder = tmp_path / "models"
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        write_model(folder / name, tensors(seed))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def listing(tmp_path):
    """A function that lists all files under the test's folder with their bytes: to see that nothing was left or changed."""

    def snapshot():
        return {
            path.relative_to(tmp_path).as_posix(): path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")
        }

    return snapshot


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs ``eutectic ARGUMENTS`` and gives its exit status, output and error output."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["eutectic", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
        return status, *capsys.readouterr()

    return command
