"""Checkpoints in several files, and indexes that lie."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from eutectic.checkpoint.safetensors import Sharded
from eutectic.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards and a function that rewrites its index."""
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"v": torch.zeros(2)}, folder / "a.safetensors")
    safetensors.torch.save_file({"w": torch.ones(2)}, folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"

    def write(text):
        index.write_text(text if isinstance(text, str) else json.dumps({"weight_map": text}))
        return index

    write({"v": "a.safetensors", "w": "b.safetensors"})
    write.folder = folder
    return write


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not a JSON object"),
        ("{}", "'weight_map' must map"),
        ('{"weight_map": {"v": 1}}', "'weight_map' must map"),
        ('{"weight_map": {"v": "a.safetensors", "v": "b.safetensors"}}', "'v' comes twice"),
        ({"v": "../a.safetensors"}, r"shard '\.\./a\.safetensors'.*plain file name"),
        ({"v": ".."}, r"shard '\.\.'"),
        ({"v": "/etc/passwd"}, "shard '/etc/passwd'"),
        ({"v": "x\\..\\a.safetensors"}, "plain file name"),
        ({"v": "a\0.safetensors"}, "plain file name"),
        ({"v": ""}, "plain file name"),
        ({"v": "pytorch_model.bin"}, r"'pytorch_model\.bin', which is no \.safetensors file"),
        ({"v": "gone.safetensors", "w": "b.safetensors"}, r"its shard 'gone\.safetensors' is missing"),
        ({"v": "b.safetensors", "w": "b.safetensors"}, r"says that 'v' is in 'b\.safetensors'"),
        ({"v": "a.safetensors", "x": "b.safetensors"}, r"says that 'x' is in 'b\.safetensors'"),
    ],
)
def test_hostile_index_is_refused_by_name(text, what, sharded):
    with pytest.raises(CheckpointError, match=rf"(?s)index\.json.*{what}"):
        Sharded(sharded(text))


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded):
    safetensors.torch.save_file({"w": torch.ones(2), "extra": torch.ones(1)}, sharded.folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"shard 'b\.safetensors' holds 'extra'"):
        Sharded(sharded({"v": "a.safetensors", "w": "b.safetensors"}))


def test_a_broken_shard_is_named_at_open(sharded):
    (sharded.folder / "b.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: 5 bytes are too short"):
        Sharded(sharded({"v": "a.safetensors", "w": "b.safetensors"}))


def test_closing_closes_every_shard(sharded):
    checkpoint = Sharded(sharded({"v": "a.safetensors", "w": "b.safetensors"}))
    assert checkpoint.read("w").tolist() == [1, 1]
    checkpoint.close()
    with pytest.raises(CheckpointError, match="read after close"):
        checkpoint.read("v")


def test_a_shard_that_links_out_of_the_folder_is_refused(sharded, tmp_path):
    (sharded.folder / "b.safetensors").rename(tmp_path / "secret.safetensors")
    (sharded.folder / "b.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(CheckpointError, match=r"'b\.safetensors' leads out of its folder"):
        Sharded(sharded({"v": "a.safetensors", "w": "b.safetensors"}))


def test_a_shard_that_links_to_itself_is_refused(sharded):
    (sharded.folder / "b.safetensors").unlink()
    (sharded.folder / "b.safetensors").symlink_to("b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        Sharded(sharded({"v": "a.safetensors", "w": "b.safetensors"}))


def test_links_within_a_hub_cache_are_followed_and_no_others(sharded, tmp_path):
    snapshot = tmp_path / "models--me--it" / "snapshots" / "123abc"
    blobs = tmp_path / "models--me--it" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sharded.folder.iterdir():
        (blobs / f"hash-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    with Sharded(snapshot / "model.safetensors.index.json") as checkpoint:
        assert checkpoint.read("w").tolist() == [1, 1]
    (snapshot / "b.safetensors").unlink()
    (snapshot / "b.safetensors").symlink_to(sharded.folder / "b.safetensors")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        Sharded(snapshot / "model.safetensors.index.json")
