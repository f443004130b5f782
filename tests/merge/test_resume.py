"""A merge that is killed, stopped or disturbed: what is left, and what the same call makes of it."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import types

import pytest
import torch

from eutectic import errors
from eutectic.checkpoint import publish
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.hashed import Hashed, fingerprint
from eutectic.checkpoint.save import save_tensors
from eutectic.checkpoint.views import Lerp
from eutectic.merge import api, run
from eutectic.merge.recipe import Recipe

RECIPE = Recipe(method="ties", base="base", experts={"a": "a", "b": "b"}, parameters={"density": 0.3})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and experts of 12 million bfloat16 elements, in a dozen chunks and more."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(1200, 1000, generator=generator).bfloat16() for i in range(10)}
    for name in ("base", "a", "b"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
        noise = 0 if name == "base" else 0.01
        moved = {key: value + noise * torch.randn(value.shape, generator=generator).bfloat16() for key, value in base.items()}
        save_tensors(Memory(moved), root / name, max_shard_bytes=8_000_000)
    return root


def merge(root, out, recipe=RECIPE, **options):
    return run.save(run.merged_from(recipe, root), out, recipe=recipe, **options)


def wanted(models, tmp_path_factory):
    return fingerprint(open_folder(merge(models, tmp_path_factory.mktemp("whole") / "out")))


def _child(root, out, started):
    started.set()
    merge(root, out)


def _lines(journal):
    try:
        return len(journal.read_bytes().splitlines())
    except FileNotFoundError:
        return 0


def test_what_else_a_process_imported_does_not_make_it_another_merge(models, monkeypatch):
    merged = run.merged_from(RECIPE, models)
    before = run._key(merged, RECIPE, 1)
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    assert run._key(merged, RECIPE, 1) == before != run._key(merged, RECIPE, 2)


def test_killed_at_twenty_moments_every_resumed_output_is_the_same(models, tmp_path, tmp_path_factory):
    expected = wanted(models, tmp_path_factory)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "eutectic.merge.run", "tests.merge.test_resume"])
    moments = random.Random(0)
    started = context.Event()
    began = time.perf_counter()
    merge(models, tmp_path / "timed")
    whole_s = time.perf_counter() - began
    resumed = 0
    for number in range(20):
        out = tmp_path / f"out{number}"
        started.clear()
        child = context.Process(target=_child, args=(models, out, started))
        child.start()
        started.wait()
        journal = tmp_path / f".out{number}.partial" / publish._JOURNAL
        if number % 2:
            time.sleep(moments.uniform(0, 1.2) * whole_s)
        else:  # in the midst of it, however busy the machine is
            least = moments.randint(2, 8)
            while child.is_alive() and _lines(journal) < least:
                time.sleep(0.001)
        child.kill()
        child.join()
        resumed += _lines(journal) > 1
        if not out.exists():
            merge(models, out)
        assert fingerprint(open_folder(out)) == expected
        assert run.verify(out) == []
        assert [path.name for path in tmp_path.glob(".*")] == []
    assert resumed >= 3, "the moments were meant to fall into the merge"


class Stopped(KeyboardInterrupt):
    pass


def stop_after(chunks):
    calls = iter(range(10**9))

    def progress(what, done, total):
        if what == "merging" and next(calls) == chunks:
            raise Stopped

    return progress


def test_what_was_written_is_not_computed_again(models, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        merge(models, tmp_path / "out", threads=1, progress=stop_after(2))  # the thread runs ahead of what is reported
    journal = tmp_path / ".out.partial" / publish._JOURNAL
    done = len(journal.read_text().splitlines()) - 1
    assert 2 <= done < 20
    written = []
    original = run.save_tensors

    def counting(checkpoint, folder, **options):
        class Counted(type(checkpoint)):
            def read_spans(self, spans):
                written.append(spans)
                return super().read_spans(spans)

        checkpoint.__class__ = Counted
        return original(checkpoint, folder, **options)

    monkeypatch.setattr(run, "save_tensors", counting)
    merge(models, tmp_path / "out")
    assert len(written) == 20 - done
    assert run.verify(tmp_path / "out") == []


def test_a_torn_chunk_and_a_torn_journal_line_are_done_again(models, tmp_path, tmp_path_factory):
    with pytest.raises(Stopped):
        merge(models, tmp_path / "out", progress=stop_after(8))
    partial = tmp_path / ".out.partial"
    data = bytearray((partial / "model.safetensors").read_bytes())
    middle = len(data) // 4
    data[middle : middle + 64] = bytes(64)
    (partial / "model.safetensors").write_bytes(data)
    with (partial / publish._JOURNAL).open("ab") as file:
        file.write(b'["layers.9.weight", 0, 12')
    merge(models, tmp_path / "out")
    assert fingerprint(open_folder(tmp_path / "out")) == wanted(models, tmp_path_factory)


def test_another_recipe_or_a_changed_input_starts_anew(models, tmp_path):
    for change in ("recipe", "input"):
        out = tmp_path / change
        with pytest.raises(Stopped):
            merge(models, out, progress=stop_after(8))
        recipe = RECIPE
        if change == "recipe":
            recipe = RECIPE.model_copy(update={"parameters": {"density": 0.5}})
        else:
            shard = next((models / "a").glob("*.safetensors"))
            os.utime(shard, ns=(1, 1))
        merge(models, out, recipe)
        assert fingerprint(open_folder(out)) == fingerprint(run.merged_from(recipe, models))


def test_an_error_removes_what_was_made_and_two_jobs_do_not_mix(models, tmp_path):
    def collide(what, done, total):
        with pytest.raises(errors.OutputError, match="another process is writing"):
            merge(models, tmp_path / "out")
        raise errors.CheckpointError("enough")

    with pytest.raises(errors.CheckpointError, match="enough"):
        merge(models, tmp_path / "out", progress=collide)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_something_to_carry_on(models, tmp_path):
    def term(what, done, total):
        if what == "merging":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: exit(128 + number))
    try:
        with pytest.raises(SystemExit):
            merge(models, tmp_path / "out", progress=term)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / ".out.partial").exists()
    merge(models, tmp_path / "out")
    assert run.verify(tmp_path / "out") == []


def test_provenance_names_hashes_of_inputs_and_output_and_verify_finds_a_changed_byte(models, tmp_path):
    out = merge(models, tmp_path / "out")
    about = json.loads((out / "eutectic.json").read_text())
    assert about["recipe_sha256"] == RECIPE.sha256()
    for key, folder in (("base", "base"), ("experts.a", "a"), ("experts.b", "b")):
        assert about["inputs"][key]["blake3"] == fingerprint(open_folder(models / folder))
    weights = Hashed(open_folder(out))
    assert about["blake3"] == {name: weights.tensor_hash(name) for name in weights.specs}
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    (changed,) = run.verify(out)
    assert "layers.9.weight: changed" in changed
    (out / "eutectic.json").unlink()
    with pytest.raises(errors.CheckpointError, match=r"eutectic\.json: no provenance"):
        run.verify(out)


def test_views_and_merges_of_merges_are_never_carried_on_by_others(models, tmp_path):
    """Their own settings are in no file, so equal files do not mean equal contents."""
    base, a, b = (open_folder(models / name) for name in ("base", "a", "b"))

    def lerp(t):
        return Lerp(base, a, t)

    def nested(scale):
        return api.merge("average", None, [api.merge("task_arithmetic", base, [a], scale=scale), b])

    for number, make in enumerate((lerp, nested)):
        out = tmp_path / str(number)
        with pytest.raises(Stopped):
            run.save(make(0.1), out, progress=stop_after(3))
        run.save(make(0.9), out)
        assert fingerprint(open_folder(out)) == fingerprint(make(0.9))
    assert run.recipe_of(nested(0.1)).sha256() != run.recipe_of(nested(0.9)).sha256()


def test_nothing_stale_survives_a_resumption(models, tmp_path):
    with pytest.raises(Stopped):
        merge(models, tmp_path / "out", progress=stop_after(3))
    (tmp_path / ".out.partial" / "chat_template.jinja").write_text("from a base that has it no more")
    out = merge(models, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "eutectic.json", "model.safetensors"]
