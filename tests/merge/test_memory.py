"""``--memory`` is a contract: the process stays below it, or the plan refuses with the tensor and what would do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.save import Budget, save_tensors
from eutectic.errors import BudgetError
from eutectic.merge import api, run
from eutectic.merge.plan import bytes_of, plan
from eutectic.merge.recipe import Recipe

CHILD = """
import json, sys
from pathlib import Path
from eutectic.merge import plan, recipe, run
root, out, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
parsed = recipe.parse(json.dumps({"method": method, "base": "base", "experts": ["a", "b", "c"]}))
merged = run.merged_from(parsed, root)
found = plan.plan(merged)
least = found.process_bytes + found.largest_bytes + plan.SLACK_BYTES + (8 << 20)
run.save(merged, out, recipe=parsed, memory_bytes=least)
# not getrusage: its peak is inherited from the process that started this one
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps({"limit": least, "peak": int(peak.split()[1]) * 1024}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(1600, 2400, generator=random) for i in range(4)}
    for name in ("base", "a", "b", "c"):
        (root / name).mkdir()
        moved = {
            key: value + (name != "base") * 0.01 * torch.randn(value.shape, generator=random) for key, value in base.items()
        }
        save_tensors(Memory({key: value.bfloat16() for key, value in moved.items()}), root / name)
    return root


def merged(models, method, **parameters):
    return api.merge(method, models / "base", [models / name for name in "abc"], **parameters)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("method", ["ties", "della", "tsv_m", "wudi"])
def test_the_process_stays_below_the_least_that_the_plan_accepts(method, models, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(models), str(tmp_path / "out"), method], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["limit"], f"{found['peak'] / 2**20:.0f} of {found['limit'] / 2**20:.0f} MiB"


def test_what_does_not_fit_is_refused_with_what_would_do(models, tmp_path):
    with pytest.raises(
        BudgetError, match=r"tsv_m: 'layers\.\d\.weight' \[1600, 2400\] BF16 takes .* Give it (\d+)MiB or more"
    ) as caught:
        run.save(merged(models, "tsv_m"), tmp_path / "out", memory_bytes=bytes_of("1MiB"))
    assert list(tmp_path.iterdir()) == []
    enough = bytes_of(str(caught.value).rpartition("Give it ")[2].partition(" or")[0])
    assert plan(merged(models, "tsv_m"), enough + (64 << 20)).work_bytes < enough


def test_the_budget_changes_no_bit(models, tmp_path):
    lazy = merged(models, "ties")
    wide = run.save(lazy, tmp_path / "wide")
    tight = run.save(merged(models, "ties"), tmp_path / "tight", memory_bytes=plan(lazy).peak_bytes, threads=1)
    assert fingerprint(api.open(wide)) == fingerprint(api.open(tight))


def test_a_part_that_is_larger_than_the_budget_runs_alone():
    budget = Budget(10)
    with budget.hold(100):
        assert budget._free == 0
    with budget.hold(4), budget.hold(6):
        assert budget._free == 0
    assert budget._free == 10


def test_small_tensors_make_the_same_together_as_alone(tmp_path):
    random = torch.Generator().manual_seed(0)
    names = [f"experts.{i}.weight" for i in range(40)]
    base = {name: torch.randn(50, 20 + i, generator=random).bfloat16() for i, name in enumerate(names)}
    experts = [{name: (x + torch.randn(x.shape, generator=random)).bfloat16() for name, x in base.items()} for _ in range(3)]
    for method in ("average", "task_arithmetic", "ties", "dare_ties", "della", "sce", "tsv_m", "lines"):
        lazy = api.merge(method, base, experts)
        out = run.save(lazy, tmp_path / method, recipe=Recipe(method=method, base="b", experts={"a": "a"}))
        for name in names:
            assert torch.equal(api.open(out).read(name), lazy.read(name)), (method, name)


@pytest.mark.parametrize(("text", "nbytes"), [("2GiB", 2 << 30), ("800 MiB", 800 << 20), ("1.5g", 3 << 29), ("64KB", 64 << 10)])
def test_amounts_of_memory(text, nbytes):
    assert bytes_of(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "1XB"])
def test_no_amounts_of_memory(text):
    with pytest.raises(BudgetError, match="like 2GiB"):
        bytes_of(text)
