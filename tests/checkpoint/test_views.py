"""Renamed, cast, selected and overlaid checkpoints."""

from __future__ import annotations

import pytest
import torch

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.views import Cast, Overlay, Rename, Select
from eutectic.errors import CheckpointError


@pytest.fixture
def memory():
    return Memory({"a.w": torch.arange(6.0).view(2, 3), "a.n": torch.tensor([7]), "b.w": torch.ones(2)}, origin="here")


def test_rename_by_mapping_and_by_function(memory):
    assert list(Rename(memory, {"a.w": "z"}).specs) == ["z", "a.n", "b.w"]
    renamed = Rename(memory, lambda name: f"m.{name}")
    assert renamed.read("m.a.w", slice(1, 2)).tolist() == [[3, 4, 5]]
    with pytest.raises(CheckpointError, match=r"here: no tensor 'a\.w'"):
        renamed.read("a.w")


def test_rename_refuses_collisions_and_strangers(memory):
    with pytest.raises(CheckpointError, match=r"here: both 'a\.w' and 'b\.w' would be renamed to 'w'"):
        Rename(memory, {"a.w": "w", "b.w": "w"})
    with pytest.raises(CheckpointError, match=r"both 'a\.w' and 'b\.w'"):
        Rename(memory, {"a.w": "b.w"})
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.v'.*Did you mean 'a\.w'"):
        Rename(memory, {"a.v": "w"})


def test_rename_may_swap(memory):
    assert Rename(memory, {"a.w": "b.w", "b.w": "a.w"}).read("a.w").tolist() == [1, 1]


def test_cast_leaves_integers(memory):
    cast = Cast(memory, torch.bfloat16)
    assert [spec.dtype for spec in cast.specs.values()] == [torch.bfloat16, torch.int64, torch.bfloat16]
    assert cast.read("a.w").dtype == torch.bfloat16
    assert cast.read("a.n").dtype == torch.int64
    with pytest.raises(CheckpointError, match=r"here: cannot cast weights to torch\.int8"):
        Cast(memory, torch.int8)


def test_select_by_glob_and_predicate(memory):
    assert list(Select(memory, "*.w").specs) == ["a.w", "b.w"]
    assert list(Select(memory, ["b.*", "a.n"]).specs) == ["a.n", "b.w"]
    assert list(Select(memory, lambda name: name.startswith("a")).specs) == ["a.w", "a.n"]
    with pytest.raises(CheckpointError, match=r"here: no tensor matches 'c\.\*'"):
        Select(memory, ["a.*", "c.*"])
    with pytest.raises(CheckpointError, match=r"no tensor 'b\.w'"):
        Select(memory, "a.*").read("b.w")


def test_overlay_replaces_and_adds(memory):
    overlay = Overlay(memory, Memory({"b.w": torch.zeros(3), "c": torch.ones(1)}, origin="top"))
    assert list(overlay.specs) == ["a.w", "a.n", "b.w", "c"]
    assert overlay.read("b.w").tolist() == [0, 0, 0]
    assert overlay.read("a.n").tolist() == [7]
    assert overlay.origin == "top over here"


class Costly(Memory):
    """One that is best read whole, takes memory to read, and has something to prepare."""

    prepared = ()

    def grain(self, name):
        return self.spec(name).numel

    def need_bytes(self, name, n):
        return 1000 + n

    def prepare(self, names, spread=map):
        self.prepared = tuple(names)


def test_overlay_costs_what_its_parts_cost():
    below = Costly({"a": torch.ones(4), "b": torch.ones(3)})
    overlay = Overlay(below, Memory({"b": torch.zeros(3)}))
    assert [overlay.grain("a"), overlay.grain("b")] == [4, 1]
    assert [overlay.need_bytes("a", 2), overlay.need_bytes("b", 2)] == [1002, 16]
    overlay.prepare(["a", "b"])
    assert below.prepared == ("a",)


@pytest.mark.parametrize(
    "view", [lambda c: Rename(c, {}), lambda c: Cast(c, torch.half), lambda c: Select(c, "*"), lambda c: Overlay(c, c)]
)
def test_closing_a_view_closes_what_it_looks_at(view, memory):
    closed = []
    memory.close = lambda: closed.append(True)
    view(memory).close()
    assert closed
