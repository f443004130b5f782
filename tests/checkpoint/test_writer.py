"""What is written, what is refused, and what is left behind when it goes wrong: nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections import namedtuple

import pytest
import safetensors.torch
import torch

from eutectic.checkpoint import hashed, save
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.publish import published, whole
from eutectic.checkpoint.safetensors import SafetensorsFile, Sharded, read_header
from eutectic.checkpoint.save import save_file, save_tensors, tensor_hashes
from eutectic.checkpoint.spec import TensorSpec, layout_nbytes
from eutectic.checkpoint.writer import SafetensorsWriter, require_space
from eutectic.errors import CheckpointError, DiskFullError, OutputError

ONE = {"w": TensorSpec((4,), torch.float32)}


@pytest.fixture
def small_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[1, 8, 50, 2**20])
def chunk(request, monkeypatch):
    """Saving in chunks, and hashing in leaves, of so many elements."""
    for module, name in ((save, "CHUNK"), (save, "LEAF"), (hashed, "LEAF")):
        monkeypatch.setattr(module, name, request.param)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_chunking_writes_the_same_file(chunk, threads, tmp_path, tensors, assert_reads):
    hashes = tensor_hashes(save_tensors(Memory(tensors), tmp_path, threads=threads))
    assert hashes == {name: hashed.Hashed(Memory(tensors)).tensor_hash(name) for name in tensors}
    assert names(tmp_path) == ["model.safetensors"]
    with SafetensorsFile(tmp_path / "model.safetensors") as checkpoint:
        assert_reads(checkpoint, tensors)
        assert list(checkpoint.specs) == list(tensors)
        assert checkpoint.metadata == {"format": "pt"}


def test_memory_that_is_not_contiguous(chunk, tmp_path, assert_reads):
    torch.manual_seed(0)
    tensors = {"t": torch.rand(6, 4).T, "step": torch.rand(9)[::2], "wide": torch.rand(3, 1).expand(3, 5)}
    save_tensors(Memory(tensors), tmp_path)
    assert_reads(SafetensorsFile(tmp_path / "model.safetensors"), tensors)


def test_data_are_aligned(tmp_path, tensors):
    save_tensors(Memory(tensors), tmp_path)
    entries = read_header(tmp_path / "model.safetensors").entries.values()
    assert min(entry.begin for entry in entries) % 4096 == 0
    assert all(entry.begin % entry.spec.dtype.itemsize == 0 for entry in entries)


def test_shards_have_an_index_that_others_read(tmp_path, tensors, assert_reads):
    save_tensors(Memory(tensors), tmp_path, max_shard_bytes=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert names(tmp_path) == [*files, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == layout_nbytes(Memory(tensors).specs)
    assert list(index["weight_map"]) == list(tensors)
    with Sharded(tmp_path / "model.safetensors.index.json") as checkpoint:
        assert_reads(checkpoint, tensors)
    for file in files:
        held = safetensors.torch.load_file(tmp_path / file)
        assert {name for name, shard in index["weight_map"].items() if shard == file} == held.keys()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 300


def test_transformers_loads_shards_that_we_wrote(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = transformers.Dinov2Model(config)
    config.save_pretrained(tmp_path)
    save_tensors(Memory(model.state_dict()), tmp_path, max_shard_bytes=2000)
    loaded = transformers.Dinov2Model.from_pretrained(tmp_path, local_files_only=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_an_empty_checkpoint_is_a_file(tmp_path):
    save_tensors(Memory({}), tmp_path)
    assert SafetensorsFile(tmp_path / "model.safetensors").specs == {}


def test_progress_is_told_and_may_stop_it(chunk, tmp_path, tensors):
    seen = []
    total = layout_nbytes(Memory(tensors).specs)
    save_tensors(Memory(tensors), tmp_path, progress=lambda what, done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)

    def stop(what, done, of):
        raise KeyboardInterrupt

    folder = tmp_path / "second"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        save_tensors(Memory(tensors), folder, progress=stop)
    assert names(folder) == []


class Broken(Checkpoint):
    specs = {"v": TensorSpec((4,), torch.float32), **ONE}  # noqa: RUF012 — a property, for all that a caller sees

    def _read(self, name, start, stop):
        if name == "w":
            raise CheckpointError("w is broken")
        return torch.zeros(stop - start)


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="w is broken"):
        save_tensors(Broken(), tmp_path)
    assert names(tmp_path) == []


def test_writes_that_do_not_fit_are_refused_by_name(tmp_path):
    with SafetensorsWriter(ONE, tmp_path) as writer:
        for name, start, chunk, what in [
            ("v", 0, torch.zeros(1), "no tensor 'v'"),
            ("w", 0, torch.zeros(1).half(), r"chunk \[1\] F16 at 0 does not fit into 'w' \[4\] F32"),
            ("w", 2, torch.zeros(3), "does not fit into 'w'"),
            ("w", -1, torch.zeros(2), "does not fit into 'w'"),
        ]:
            with pytest.raises(OutputError, match=what):
                writer.write(name, start, chunk)
        writer.write("w", 0, torch.ones(4))
    assert SafetensorsFile(tmp_path / "model.safetensors").read("w").tolist() == [1, 1, 1, 1]


def test_a_tensor_that_was_not_written_is_named(tmp_path):
    with (
        pytest.raises(OutputError, match="only 3 of 4 elements of 'w' were written"),
        SafetensorsWriter(ONE, tmp_path) as writer,
    ):
        writer.write("w", 1, torch.zeros(3))
    assert names(tmp_path) == []


def test_writing_after_the_end_is_refused(tmp_path):
    with SafetensorsWriter(ONE, tmp_path) as writer:
        writer.write("w", 0, torch.zeros(4))
    writer.finish()
    with pytest.raises(OutputError, match=r"model\.safetensors: 'w' written after the file was closed"):
        writer.write("w", 0, torch.zeros(4))


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        ({"z": TensorSpec((1,), torch.complex64)}, r"tensor 'z' has the dtype torch\.complex64"),
        ({"__metadata__": ONE["w"]}, "'__metadata__' cannot be the name"),
        ({"\ud800": ONE["w"]}, "cannot be the name"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(layout, what, tmp_path):
    with pytest.raises(OutputError, match=what):
        SafetensorsWriter(layout, tmp_path)
    assert names(tmp_path) == []


def test_files_are_never_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(OutputError, match=r"model\.safetensors: exists already"):
        save_tensors(Memory({"w": torch.zeros(1)}), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"gone/model\.safetensors: cannot be written: No such file"):
        save_tensors(Memory({"w": torch.zeros(1)}), tmp_path / "gone")


# ── no room ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_disk_with_too_little_room_is_refused_beforehand(tmp_path, small_disk):
    with pytest.raises(DiskFullError, match=r"out.*400000 bytes are needed, 10 are free"):
        require_space(tmp_path / "not" / "yet" / "out", 400_000)
    with pytest.raises(DiskFullError, match="bytes are needed, 10 are free"), published(tmp_path / "out") as folder:
        save_tensors(Memory({"w": torch.zeros(4)}), folder)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "ftruncate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_leaves_nothing(call, code, tmp_path, tensors, monkeypatch):
    def full(*args):
        raise OSError(code, os.strerror(code))

    if call == "ftruncate":
        monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFullError, match=r"model.*\.safetensors: no room .*: \d+ bytes are needed, \d+ are free"):
        save_tensors(Memory(tensors), tmp_path, max_shard_bytes=300)
    with pytest.raises(DiskFullError), published(tmp_path / "out") as folder:
        save_tensors(Memory(tensors), folder)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_in_the_callers_code_is_explained(tmp_path):
    with pytest.raises(DiskFullError, match="out: no room"), published(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_file_systems_that_cannot_reserve_are_served(tmp_path, tensors, assert_reads, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    save_tensors(Memory(tensors), tmp_path)
    assert_reads(SafetensorsFile(tmp_path / "model.safetensors"), tensors)


def test_short_writes_are_continued(tmp_path, tensors, assert_reads, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:7], offset))
    save_tensors(Memory(tensors), tmp_path)
    assert_reads(SafetensorsFile(tmp_path / "model.safetensors"), tensors)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one", "two"):
        with whole(path) as partial:
            partial.write_text(text)
        assert path.read_text() == text
    with pytest.raises(UnicodeEncodeError), whole(path) as partial:
        partial.write_text("thr\udc00")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_go_into_one_file_of_any_name_or_none(tmp_path):
    class Broken(Memory):
        def _read(self, name, start, stop):
            raise KeyError(name)

    path, x = tmp_path / "heads.safetensors", torch.arange(6.0)
    for tensor in (x, 2 * x):
        assert list(save_file(Memory({"x": tensor}), path)) == ["x"]
        with SafetensorsFile(path) as file:
            assert torch.equal(file.read("x"), tensor)
    with pytest.raises(KeyError):
        save_file(Broken({"x": x}), path)
    with SafetensorsFile(path) as file:
        assert torch.equal(file.read("x"), 2 * x)
    assert list(tmp_path.iterdir()) == [path]


# ── published ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_publishes_in_one_step(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with published(out) as folder:
        assert folder.parent == out.parent
        assert folder.name.startswith(".out.partial-")
        (folder / "x").write_text("1")
        assert not out.exists()
    assert names(out) == ["x"]
    assert names(out.parent) == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), SystemExit(), OSError(errno.EIO, "I/O error")])
def test_an_exception_leaves_nothing(error, tmp_path):
    def work():
        with published(tmp_path / "new" / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text("1")
            raise error

    with pytest.raises(type(error)):
        work()
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    with pytest.raises(OutputError, match=r"out: exists already\. Choose another path, or pass replace=True \(--force"):
        published(tmp_path / "out").__enter__()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["mine"]


def test_replace_swaps_the_folder_and_nothing_stale_survives(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_text("1")
    with published(tmp_path / "out", replace=True) as folder:
        (folder / "fresh").write_text("2")
        assert names(tmp_path / "out") == ["stale.safetensors"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["fresh"]


@pytest.mark.parametrize("stage", ["fsync", "rename"])
def test_a_failed_replacement_leaves_the_old_folder(stage, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").write_text("1")
    rename = type(out).rename

    def fail(self, target=None):
        if stage == "fsync" or ".partial-" in self.name:
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(*(type(out), "rename", fail) if stage == "rename" else (os, "fsync", fail))
    with pytest.raises(OutputError, match="out: cannot be written: I/O error"), published(out, replace=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old.safetensors"]


def test_a_file_a_link_and_a_home_are_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder" / "work").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path / "folder" / "work")
    for name, what in {"file": "is a file", "link": "is a symlink", "folder": "would be deleted with it"}.items():
        with pytest.raises(OutputError, match=f"{name}: .*{what}"):
            published(tmp_path / name, replace=True).__enter__()
    assert names(tmp_path) == ["file", "folder", "link"]


@pytest.mark.parametrize("out", ["models/base", "models", "models/base/out", "elsewhere/base", "models/../models/base"])
def test_an_input_is_never_the_output(out, tmp_path):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "w").write_text("1")
    (tmp_path / "elsewhere").symlink_to("models")
    for source in (base, base / "w"):
        if source.is_file() and out == "models/base/out":
            continue
        with pytest.raises(OutputError, match="is, holds or lies in the input"):
            published(tmp_path / out, replace=True, inputs=[source]).__enter__()
    assert names(base) == ["w"]


def test_a_neighbour_of_an_input_is_no_input(tmp_path):
    (tmp_path / "base").mkdir()
    with published(tmp_path / "base-merged", inputs=[tmp_path / "base"]):
        pass
    assert names(tmp_path) == ["base", "base-merged"]


def test_a_folder_without_a_model_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="thesis: holds no model"), published(tmp_path / "thesis", replace=True):
        pass
    assert names(tmp_path / "thesis") == ["thesis.txt"]
