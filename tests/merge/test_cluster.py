"""The same merge on a cluster: a real one, of two worker processes on this machine."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
import types

import pytest
import torch

from eutectic import cli, errors
from eutectic.checkpoint import publish
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.checkpoint.save import save_tensors, units
from eutectic.merge import cluster, run
from eutectic.merge.mergekit import parse_mergekit
from eutectic.merge.recipe import Recipe
from eutectic.merge.view import Merged

pytestmark = pytest.mark.slow  # the cluster needs ten seconds to begin
SHARD_BYTES = 8_000_000


@pytest.fixture(scope="module")
def ray():
    """Ray, connected to a cluster of two worker processes that ends with the module."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    # what the tests define goes to the workers as it is: they may have no such module
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        yield ray
    finally:
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {name: value} if value is not None else {}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and experts of 12 million bfloat16 elements, and small tensors between the large ones."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {}
    for i in range(10):
        base[f"layers.{i}.weight"] = torch.randn(1200, 1000, generator=generator).bfloat16()
        base[f"layers.{i}.bias"] = torch.randn(1200, generator=generator).bfloat16()
    for name in ("base", "a", "b"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
        noise = 0 if name == "base" else 0.01
        moved = {key: value + noise * torch.randn(value.shape, generator=generator).bfloat16() for key, value in base.items()}
        save_tensors(Memory(moved), root / name)
    return root


def opened(models, **recipe):
    recipe = Recipe(base="base", experts={"a": "a", "b": "b"}, **recipe)
    return run.merged_from(recipe, models), recipe


def saved(merged, out, recipe, **options):
    return run.save(merged, out, recipe=recipe, max_shard_bytes=SHARD_BYTES, **options)


def require_equal(out, other):
    assert (out / "eutectic.json").read_bytes() == (other / "eutectic.json").read_bytes()
    assert fingerprint(open_folder(out)) == fingerprint(open_folder(other))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in other.iterdir())
    assert run.verify(out) == []


def stopping_once(marker, write):
    """``cluster._write`` that kills its process half-way, the first time that it comes to a certain tensor."""

    def work(checkpoint, folder, max_shard_bytes, group):
        if "layers.5.weight" in {span.name for unit in group for span in unit} and not marker.exists():
            assert len(group) > 1
            write(checkpoint, folder, max_shard_bytes, group[: len(group) // 2])
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return write(checkpoint, folder, max_shard_bytes, group)

    return work


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("ties", {"over": "model", "density": 0.3}),
        ("ties", {"over": "tensor", "density": 0.3}),
        ("model_stock", {}),  # sums of floating-point numbers, whose order counts
    ],
)
def test_a_worker_killed_as_it_writes_changes_no_bit(ray, models, tmp_path, monkeypatch, method, parameters):
    merged, recipe = opened(models, method=method, parameters=parameters)
    local = saved(merged, tmp_path / "local", recipe)
    marker, said = tmp_path / "died", []
    monkeypatch.setattr(cluster, "_write", stopping_once(marker, cluster._write))
    out = saved(
        merged, tmp_path / "out", recipe, cluster="auto", progress=lambda what, done, total: said.append((what, done == total))
    )
    assert int(marker.read_text()) != os.getpid()
    assert (("measuring", True) in said) == (parameters.get("over") == "model")
    assert said[-1] == ("merging", True)
    assert len(said) > 2, "there were to be several tasks"
    require_equal(out, local)


class Deadly(SafetensorsFile):
    """A file whose reader is killed, the first time that it comes to a certain tensor."""

    def __init__(self, path, marker, tensor):
        super().__init__(path)
        self.marker, self.tensor = marker, tensor

    def read_spans(self, spans):
        if spans[0].name == self.tensor and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read_spans(spans)


def test_a_worker_killed_as_it_measures_changes_no_bit(ray, models, tmp_path):
    merged, recipe = opened(models, method="ties", parameters={"density": 0.3})
    local = saved(merged, tmp_path / "local", recipe)
    deadly = Deadly(models / "a" / "model.safetensors", tmp_path / "died", "layers.5.weight")
    merged = Merged("ties", merged.base, {"a": deadly, "b": merged.experts["b"]}, {"density": 0.3})
    out = saved(merged, tmp_path / "out", recipe, cluster="auto")
    assert int((tmp_path / "died").read_text()) != os.getpid()
    require_equal(out, local)


def _driver(models, out, address):
    """Merge on the cluster, and be killed when some of it is done."""
    import ray

    def progress(what, done, total):
        if what == "merging" and done > total / 3:
            os.kill(os.getpid(), signal.SIGKILL)

    ray.init(address, log_to_driver=False)
    merged, recipe = opened(models, method="ties", parameters={"density": 0.3})
    saved(merged, out, recipe, cluster="auto", progress=progress)


def test_a_killed_driver_s_work_is_carried_on_by_the_same_call(ray, models, tmp_path, monkeypatch):
    merged, recipe = opened(models, method="ties", parameters={"density": 0.3})
    local = saved(merged, tmp_path / "local", recipe)
    address = ray.get_runtime_context().gcs_address
    child = multiprocessing.get_context("spawn").Process(target=_driver, args=(models, tmp_path / "out", address))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    done = len((tmp_path / ".out.partial" / publish._JOURNAL).read_text().splitlines()) - 1
    shutil.copytree(tmp_path / ".out.partial", tmp_path / ".other.partial")
    left, groups = [], cluster._groups

    def counting(checkpoint, missing, tasks):
        left.extend(missing)
        return groups(checkpoint, missing, tasks)

    monkeypatch.setattr(cluster, "_groups", counting)
    out = saved(merged, tmp_path / "out", recipe, cluster="auto")
    assert done > 0
    assert len(left) == len(list(units(merged))) - done
    require_equal(out, local)
    require_equal(saved(merged, tmp_path / "other", recipe), local)  # without the cluster, too
    assert not (tmp_path / ".other.partial").exists()


def test_a_task_that_is_lost_too_often_is_one_message_and_the_rest_is_kept(ray, models, tmp_path, monkeypatch):
    merged, recipe = opened(models, method="task_arithmetic")
    marker, finished = tmp_path / "died", tmp_path / "finished"
    write = stopping_once(marker, cluster._write)

    def later(checkpoint, folder, max_shard_bytes, group):
        """Dies only when another task is through."""
        while "layers.5.weight" in {span.name for unit in group for span in unit} and not finished.exists():
            time.sleep(0.05)
        return write(checkpoint, folder, max_shard_bytes, group)

    monkeypatch.setattr(cluster, "_write", later)
    monkeypatch.setattr(cluster, "RETRIES", 0)
    with pytest.raises(errors.ClusterError, match="was lost 1 times"):
        saved(merged, tmp_path / "out", recipe, cluster="auto", progress=lambda *what: finished.touch())
    assert len((tmp_path / ".out.partial" / publish._JOURNAL).read_text().splitlines()) > 1
    out = saved(merged, tmp_path / "out", recipe, cluster="auto")
    require_equal(out, saved(merged, tmp_path / "local", recipe))


def test_merges_of_several_parts_are_the_same(ray, models, tmp_path):
    text = """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 3], parameters: {weight: 0.3}}
      - {model: b, layer_range: [0, 3], parameters: {weight: 1}}
  - sources: [{model: base, layer_range: [2, 6]}, {model: b, layer_range: [4, 8]}]
    parameters: {weight: 0.5}
"""
    recipe = parse_mergekit(text)
    local = saved(recipe.open(models), tmp_path / "local", recipe)
    require_equal(saved(recipe.open(models), tmp_path / "out", recipe, cluster="auto"), local)


def test_the_command_line_merges_adapters_on_a_cluster(ray, tmp_path, monkeypatch):
    """Whole matrices, and experts that are adapters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("method: iso_c\nsuite: mini\nexperts: [mnist, letters]\n")
    for arguments in (["local"], ["out", "--cluster", "auto", "--memory", "3GiB"]):
        monkeypatch.setattr(sys, "argv", ["eutectic", "merge", "recipe.yaml", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert not done.value.code
    require_equal(tmp_path / "out", tmp_path / "local")


def test_an_error_in_a_task_is_the_driver_s_and_leaves_nothing(ray, models, tmp_path):
    merged, recipe = opened(models, method="task_arithmetic")
    broken = {name: merged.experts["a"].read(name) for name in merged.specs}
    broken["layers.7.weight"] = torch.full_like(broken["layers.7.weight"], torch.nan)
    (tmp_path / "broken").mkdir()
    save_tensors(Memory(broken), tmp_path / "broken")
    merged = Merged("task_arithmetic", merged.base, {"a": open_folder(tmp_path / "broken")})
    with pytest.raises(errors.NonFiniteError, match=r"expert 'a' .* in 'layers\.7\.weight'; repair"):
        saved(merged, tmp_path / "out", recipe, cluster="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_machines_that_differ_or_are_too_small_are_refused(ray, models, tmp_path, monkeypatch):
    merged, recipe = opened(models, method="task_arithmetic")
    with monkeypatch.context() as patch:
        patch.setattr(cluster.record, "versions", lambda packages: {"torch": "0.1"})
        with pytest.raises(errors.ClusterError, match=r"has torch .*, where the merge was begun is 0\.1"):
            saved(merged, tmp_path / "out", recipe, cluster="auto")
    with monkeypatch.context() as patch:
        patch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 1e6}}])
        with pytest.raises(errors.BudgetError, match="no machine of the cluster"):
            saved(merged, tmp_path / "out", recipe, cluster="auto")
    with pytest.raises(errors.BudgetError, match="Give it"):
        saved(merged, tmp_path / "out", recipe, cluster="auto", memory_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_no_file_is_refused(models, tmp_path):
    merged, _ = opened(models, method="task_arithmetic")
    expert = Memory({name: merged.experts["a"].read(name) for name in merged.specs})
    with pytest.raises(errors.CheckpointError, match="models that are files"):
        run.save(Merged("task_arithmetic", merged.base, {"a": expert}), tmp_path / "out", cluster="auto")
    with pytest.raises(errors.CheckpointError, match="models that are files"):
        run.save(merged.base, tmp_path / "out", cluster="auto")
    assert list(tmp_path.iterdir()) == []


def test_without_ray_or_a_cluster_one_message_says_so(models, tmp_path, monkeypatch):
    merged, recipe = opened(models, method="task_arithmetic")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(errors.MissingDependencyError, match=r"pip install 'eutectic\[cluster\]'"):
        saved(merged, tmp_path / "out", recipe, cluster="auto")

    def init(address, **options):
        raise ConnectionError("no one is there")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False, init=init))
    for address, why in (("auto", "no one is there"), ("127.0.0.1:1", ".*"), ("127.0.0.1:99999", ".*"), ("ray://x:1", ".*")):
        with pytest.raises(errors.ClusterError, match=f"^{address}: no Ray cluster answers: {why}. `ray start --head`"):
            saved(merged, tmp_path / "out", recipe, cluster=address)
    assert list(tmp_path.iterdir()) == []
