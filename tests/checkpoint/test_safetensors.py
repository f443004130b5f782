"""Files of our own and of the safetensors package, and files that lie."""

from __future__ import annotations

import gc
import json
import os
import threading

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.safetensors import SafetensorsFile, Sharded, read_header
from eutectic.checkpoint.save import save_tensors
from eutectic.checkpoint.views import Cast, Overlay, Rename, Select
from eutectic.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes):
    return {**F32, **changes}


@pytest.fixture
def file(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_reads_what_the_safetensors_package_wrote(file, tensors, assert_reads):
    with SafetensorsFile(file) as checkpoint:
        assert_reads(checkpoint, tensors)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.origin == str(file)


def test_the_safetensors_package_reads_what_we_wrote(tmp_path, tensors):
    save_tensors(Memory(tensors), tmp_path)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_header_places_every_tensor(file, tensors):
    header = read_header(file)
    assert max(entry.end for entry in header.entries.values()) == file.stat().st_size
    assert all(entry.end - entry.begin == tensors[name].nbytes for name, entry in header.entries.items())


@pytest.mark.parametrize("kind", ["memory", "rename", "cast", "select", "overlay", "file", "sharded"])
def test_every_checkpoint_reads_whole_by_rows_and_flat(kind, file, tmp_path, tensors, assert_reads):
    if kind == "sharded":
        save_tensors(Memory(tensors), tmp_path, max_shard_bytes=300)
    checkpoint = {
        "memory": lambda: Memory(tensors),
        "rename": lambda: Rename(Rename(SafetensorsFile(file), lambda name: f"x.{name}"), lambda name: name.removeprefix("x.")),
        "cast": lambda: Cast(Select(SafetensorsFile(file), ["w.F32", "w.I64", "cube"]), torch.float64),
        "select": lambda: Select(SafetensorsFile(file), ["w.*", "cube", "empty"]),
        "overlay": lambda: Overlay(Memory({"cube": torch.zeros(9)}), SafetensorsFile(file)),
        "file": lambda: SafetensorsFile(file),
        "sharded": lambda: Sharded(tmp_path / "model.safetensors.index.json"),
    }[kind]()
    wanted = tensors
    if kind == "cast":
        wanted = {"w.F32": tensors["w.F32"].double(), "w.I64": tensors["w.I64"], "cube": tensors["cube"].double()}
    if kind == "select":
        wanted = {name: tensor for name, tensor in tensors.items() if name[:2] == "w." or name in ("cube", "empty")}
    with checkpoint:
        assert_reads(checkpoint, wanted)


def test_rows_and_ranges_outside_are_refused(file):
    checkpoint = SafetensorsFile(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*'cube' has 24 elements, not 20:25"):
        checkpoint.read_flat("cube", 20, 25)
    with pytest.raises(CheckpointError, match="step 1"):
        checkpoint.read("cube", slice(0, 4, 2))
    with pytest.raises(CheckpointError, match="Did you mean 'cube'"):
        checkpoint.read("cub")


def test_reading_after_close_is_refused(file):
    checkpoint = SafetensorsFile(file)
    checkpoint.read("cube")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="read after close"):
        checkpoint.read("cube")


def test_a_forgotten_checkpoint_gives_its_file_back(file):
    checkpoint = SafetensorsFile(file)
    checkpoint.read("cube")
    fd = checkpoint._fd
    del checkpoint
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_threads_read_the_same(file, tensors, assert_reads):
    failures = []

    def work():
        try:
            assert_reads(checkpoint, tensors)
        except BaseException as error:
            failures.append(error)

    with SafetensorsFile(file) as checkpoint:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_short_reads_are_continued(file, tensors, assert_reads, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    assert_reads(SafetensorsFile(file), tensors)


def test_a_file_that_shrinks_is_named(file):
    checkpoint = SafetensorsFile(file)
    name, last = max(read_header(file).entries.items(), key=lambda item: item[1].end)
    checkpoint.read("cube")
    with file.open("r+b") as handle:
        handle.truncate(last.end - 1)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: shrank while being read: '{name}'"):
        checkpoint.read(name)


def test_a_file_that_changes_before_the_first_read_is_refused(file):
    checkpoint = SafetensorsFile(file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="has changed since"):
        checkpoint.read("cube")


def test_what_is_legal(tmp_path, write_raw):
    padded = write_raw(tmp_path / "a", json.dumps({"w": F32}).encode() + b"   ", bytes(8))
    assert read_header(padded).entries["w"].spec.shape == (2,)
    assert read_header(write_raw(tmp_path / "b", {})).entries == {}
    empties = {"a": entry(shape=[0], data_offsets=[8, 8]), "w": F32, "b": entry(shape=[3, 0], data_offsets=[0, 0])}
    assert read_header(write_raw(tmp_path / "c", empties, bytes(8))).entries.keys() == empties.keys()


def test_bytes_that_are_no_bool_become_true(tmp_path, write_raw):
    path = write_raw(tmp_path / "a", {"m": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\0\1\2")
    assert SafetensorsFile(path).read("m").tolist() == [False, True, True]


HOSTILE = {
    "shape_bool": ({"w": entry(shape=[True, 2])}, 8, r"tensor 'w'.*shape \[True, 2\]"),
    "shape_negative": ({"w": entry(shape=[-2])}, 8, r"tensor 'w'.*shape \[-2\]"),
    "shape_float": ({"w": entry(shape=[2.0])}, 8, "tensor 'w'.*not a list of integers"),
    "shape_text": ({"w": entry(shape="2")}, 8, "tensor 'w'.*not a list of integers"),
    "shape_huge": ({"w": entry(shape=[2**40, 2**40])}, 8, "tensor 'w'.*larger than any tensor"),
    "shape_huge_but_empty": ({"w": entry(shape=[0, 2**63], data_offsets=[0, 0])}, 0, "tensor 'w'.*larger than any tensor"),
    "shape_of_many_axes": ({"w": entry(shape=[1] * 65, data_offsets=[0, 4])}, 4, "tensor 'w'.*larger than any tensor"),
    "shape_of_huge_numbers": ({"w": entry(shape=[10**4000] * 500)}, 8, "tensor 'w'.*larger than any tensor"),
    "dtype_unknown": ({"w": entry(dtype="F4")}, 8, "tensor 'w' has the dtype 'F4'; accepted are F64, F32"),
    "dtype_list": ({"w": entry(dtype=["F32"])}, 8, "tensor 'w' has the dtype"),
    "offsets_backwards": ({"w": entry(data_offsets=[8, 0])}, 8, "tensor 'w'.*data_offsets"),
    "offsets_three": ({"w": entry(data_offsets=[0, 4, 8])}, 8, "tensor 'w'.*data_offsets"),
    "offsets_negative": ({"w": entry(data_offsets=[-8, 0])}, 8, "tensor 'w'.*data_offsets"),
    "offsets_bool": ({"w": entry(data_offsets=[False, 8])}, 8, "tensor 'w'.*data_offsets"),
    "offsets_null": ({"w": entry(data_offsets=None)}, 8, "tensor 'w'.*data_offsets"),
    "length_wrong": ({"w": entry(shape=[3])}, 8, r"tensor 'w' \[3\] F32 takes 12 bytes, but its data_offsets span 8"),
    "overlap": ({"v": F32, "w": entry(data_offsets=[4, 12])}, 12, "tensor 'w' overlaps tensor 'v'"),
    "same_place": ({"v": F32, "w": F32}, 8, "tensor 'w' overlaps tensor 'v'"),
    "hole": ({"v": F32, "w": entry(data_offsets=[12, 20])}, 20, "hole of 4 bytes lies between tensor 'v' and tensor 'w'"),
    "hole_first": ({"w": entry(data_offsets=[4, 12])}, 12, "hole of 4 bytes lies between the header and tensor 'w'"),
    "truncated": ({"w": F32}, 7, "truncated: tensor 'w' ends at byte"),
    "trailing": ({"w": F32}, 9, "1 trailing bytes after tensor 'w'"),
    "trailing_only": ({}, 5, "5 trailing bytes after the header"),
    "metadata_number": ({"__metadata__": {"a": 1}, "w": F32}, 8, "__metadata__"),
    "metadata_list": ({"__metadata__": [], "w": F32}, 8, "__metadata__"),
    "entry_list": ({"w": [1]}, 0, "tensor 'w' must have 'dtype', 'shape' and 'data_offsets'"),
    "entry_poor": ({"w": {"dtype": "F32", "shape": [2]}}, 8, "tensor 'w' must have"),
    "name_surrogate": (rb'{"\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "not Unicode text"),
    "duplicate_tensor": (b'{"w": 1, "w": 2}', 0, "'w' comes twice"),
    "duplicate_key": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', 0, "'dtype' comes twice"),
    "not_utf8": (b'{"\xff": 1}', 0, "not a JSON object"),
    "utf16": ("{}".encode("utf-16"), 0, "not a JSON object"),
    "not_json": (b"{", 0, "not a JSON object"),
    "not_an_object": (b"[]", 0, "not a JSON object but a list"),
    "padding_nul": (b"{}\0", 0, "not a JSON object"),
    "nested": (b'{"w":' + b"[" * 200_000, 0, "not a JSON object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_by_name(case, tmp_path, write_raw):
    header, size, what = HOSTILE[case]
    path = write_raw(tmp_path / "evil.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=rf"(?s)evil\.safetensors: .*{what}"):
        read_header(path)
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [3, 100, 2**31, 2**64 - 1])
def test_header_length_beyond_the_file_is_refused(length, tmp_path, write_raw):
    path = write_raw(tmp_path / "evil", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"evil: claims a header of {length} bytes"):
        read_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "sparse"
    path.write_bytes((200_000_000).to_bytes(8, "little"))
    os.truncate(path, 300_000_000)
    asked = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: asked.append(len(views[0])) or preadv(fd, views, at))
    with pytest.raises(CheckpointError, match="sparse: claims a header of 200000000 bytes"):
        read_header(path)
    assert asked == [8]


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"1234567")
    os.mkfifo(tmp_path / "pipe")
    for name, what in {
        "short": "7 bytes are too short",
        "none": "No such file",
        "pipe": "regular",
        ".": "regular",
        "\0": "null",
    }.items():
        with pytest.raises(CheckpointError, match=what):
            read_header(tmp_path / name)


FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
GOOD = json.dumps({"__metadata__": {"a": "b"}, "v": F32, "w": entry(data_offsets=[8, 16])}).encode()


def only_refuses(call, path):
    """Whatever the file holds, it is read or it is refused with its path; no other exception comes out."""
    refusal = str(path)
    try:
        call()
    except CheckpointError as error:
        refusal = str(error)
    assert str(path) in refusal


def read_all(path):
    with SafetensorsFile(path) as checkpoint:
        for name in checkpoint.specs:
            checkpoint.read(name)


@FUZZ
@given(data=st.binary(max_size=64), framed=st.booleans())
def test_random_bytes_raise_nothing_else(data, framed, tmp_path):
    path = tmp_path / "fuzz"
    path.write_bytes((len(data).to_bytes(8, "little") if framed else b"") + data)
    only_refuses(lambda: read_header(path), path)


@FUZZ
@given(
    edits=st.lists(st.tuples(st.integers(0, 7 + len(GOOD)), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_a_damaged_file_raises_nothing_else(edits, cut, tmp_path):
    data = bytearray(len(GOOD).to_bytes(8, "little") + GOOD + bytes(16))
    for at, byte in edits:
        data[at] = byte
    path = tmp_path / "fuzz"
    path.write_bytes(data[: len(data) - cut] if cut > 20 else data)
    only_refuses(lambda: read_all(path), path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries({}, optional={"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON})


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["v", "w", "__metadata__"]), ENTRIES | JSON, max_size=3))
def test_any_json_raises_nothing_else(header, tmp_path, write_raw):
    path = write_raw(tmp_path / "fuzz", header, bytes(8))
    only_refuses(lambda: read_header(path), path)
