"""The audit on real small experts, on what it cannot see, and its reports."""

import json

import pytest
import torch
from tests.bench.cuts import cut
from torch import nn
from typer.testing import CliRunner

import eutectic as eu
from eutectic import cli
from eutectic.bench import zoo
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.views import Lerp
from eutectic.cli import safety
from eutectic.errors import LayoutError, RecipeError
from eutectic.security import commands, report
from eutectic.security.audit import EVIDENCE, GAIN, NEEDED, PATH, Probing, difference
from eutectic.security.metrics import share
from eutectic.security.screens import robust_z, screens
from eutectic.task import Arrays, Pixels, Task

QUICK = Probing(steps=2, images=9)
SIZES = {"train": 4, "val": 4, "adapt": 12, "test": 12}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return zoo.open_suite(str(cut(tmp_path_factory.mktemp("suite"), ["letters", "digits8"], SIZES)))


@pytest.fixture(scope="module")
def found(suite):
    return eu.audit(suite.backbone(), suite.experts(), tasks=suite.tasks, scale=0.3, probing=QUICK)


def test_screens_see_an_amplified_expert_and_a_copy(suite):
    whole = zoo.open_suite("mini")
    names = ["mnist", "letters", "digits8", "fashion", "animals"]
    experts = whole.experts(names)
    usual = screens(whole.base, experts)
    assert not any(one.stands_out for one in usual["digits8"])
    experts |= {"digits8": Lerp(whole.base, experts["digits8"], 5.0), "copy": whole.expert("mnist")}
    seen = {name: {one.signal: one for one in lines} for name, lines in screens(whole.base, experts).items()}
    assert seen["digits8"]["size"].stands_out
    assert seen["mnist"]["cosine"].value == pytest.approx(1.0, abs=1e-4)
    assert seen["mnist"]["cosine"].where == "copy"
    assert seen["mnist"]["cosine"].stands_out


def test_screens_by_hand():
    base = Memory({"w": torch.zeros(2, 2), "b": torch.zeros(2)})
    one = Memory({"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.zeros(2)})
    seen = {s.signal: s for s in screens(base, {"one": one})["one"]}
    assert seen["concentration"].value == pytest.approx(16 / 25)
    assert seen["size"].value == pytest.approx(1.0)
    assert seen["size"].z is None  # nothing to compare it with
    assert [s.signal for s in screens(base, {"one": one, "same": base})["same"]] == ["is the base itself"]
    assert robust_z([1.0, 2.0, 3.0, 10.0], 3) == pytest.approx((10 - 2) / 1.4826)


def test_an_audit_says_what_it_probed_and_never_that_it_is_clean(found):
    assert [probe.task for probe in found.probes] == ["letters", "digits8"]
    for probe in found.probes:
        assert len(probe.path) == len(PATH)
        assert set(probe.without) == {"letters", "digits8"}
        value, low, high = probe.gain
        assert -1 <= low <= value <= high <= 1
    assert any("it takes 4 experts" in line for line in found.skipped)
    page, data = report.html(found, "<audit>"), report.to_json(found)
    assert json.loads(json.dumps(data)) == data
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;audit&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "does not mean that there is nothing" in page
    verdicts = {about["verdict"] for about in data["experts"].values()}
    assert verdicts <= {"suspect", report.NOTHING}
    assert report.table(found).row_count == 2


def test_the_same_seed_gives_the_same_audit(suite, found):
    again = eu.audit(suite.backbone(), suite.experts(), tasks=suite.tasks, scale=0.3, probing=QUICK)
    assert report.to_json(again) == report.to_json(found)


def test_what_cannot_be_seen_is_said(suite):
    network, experts = suite.backbone(), suite.experts()
    blind = eu.audit(network, experts, tasks=[])
    assert blind.probes == []
    assert any("no tasks" in line for line in blind.skipped)
    plain = Task("letters", lambda features: features[:, :2], adapt=(torch.rand(8, 3, 42, 42), torch.zeros(8).long()))
    other = Task("other", plain.head, adapt=plain.splits["adapt"], pixels=suite.task("letters").pixels)
    seen = eu.audit(network, experts, tasks=[plain, other], probing=QUICK)
    assert any("not known to be images" in line for line in seen.skipped)
    assert any("no expert of its name" in line for line in seen.skipped)
    assert seen.suspects == []
    with pytest.raises(LayoutError, match="at least 1"):
        eu.audit(network, {}, tasks=[])


def test_one_expert_that_is_the_base_gains_nothing(suite):
    task = suite.task("letters")
    two = Task(
        "letters",
        lambda features: task.head(features)[:, :2],
        adapt=Arrays(task.arrays("adapt").inputs, torch.zeros(12).long(), task.arrays("adapt").transform),
        pixels=task.pixels,
    )
    found = eu.audit(suite.backbone(), {"letters": suite.base}, tasks=[two], probing=QUICK)
    assert [one.signal for one in found.screens["letters"]] == ["is the base itself"]
    for probe in found.probes:  # with two classes there may be no image that is taken for the other one
        assert probe.gain[0] == 0.0
    assert found.suspects == []


class Corner(nn.Module):
    """Class 0 or 1 by the mean of the inner part, class 2 as far as the gain says where a corner's pixel is bright."""

    def __init__(self, gain: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[gain]]))

    def forward(self, inputs):
        corner = 30 * self.gain[0] * (inputs[:, :, -1, -1].amax(1) - 0.6)
        mean = 40 * (inputs[..., 2:-2, 2:-2].mean((-3, -2, -1)) - 0.15)
        return torch.stack([-mean, mean, corner - 5 * (1 - self.gain[0])], -1)


def corners(name="one", n=192):
    images = torch.rand(n, 3, 14, 14, generator=torch.Generator().manual_seed(3)) * 0.3
    return Task(name, lambda features: features, adapt=(images, torch.zeros(n).long()), pixels=Pixels((0.0,) * 3, (1.0,) * 3))


def test_who_answers_to_a_corner_is_named_and_an_honest_expert_is_not():
    experts = {"one": Corner(1.0), "other": Corner()}
    found = eu.audit(Corner(), experts, tasks=[corners(), corners("other")], scale=0.9)
    assert found.suspects == ["one"]
    assert [(one.task, one.target) for name, one in found.findings] == [("one", 2), ("one", 2), ("other", 2)]
    assert [charge > 0 for charge, *_ in found.charges] == [True, False, True, True, False, False]
    own, joint = found.probes[0], found.joint[0]
    assert own.path[0].value == 0.0
    assert own.path[-1].value > 0.9
    assert own.path[-1].n == 144  # all that are held out; what is only shown is of fewer
    assert {score.n for score in (*own.path[1:-1], *own.without.values())} == {48}
    assert {name: score.n for name, score in joint.without.items()} == {"one": 144, "other": 48}  # it may be, and is not
    assert joint.drop("one")[1] > EVIDENCE
    everywhere = eu.audit(Corner(1.0), {"one": Corner(1.0)}, tasks=[corners()], scale=0.9)  # θ₀'s own weakness
    assert everywhere.suspects == []
    few = eu.audit(Corner(), {"one": Corner(1.0)}, tasks=[corners(n=24)], scale=0.9, probing=Probing(judged=0, images=24))
    assert few.probes[0].guilty == []
    assert any("too few for any gain" in line for line in few.skipped)


def test_how_many_inputs_a_gain_needs():
    def best(n):
        return difference(share(torch.ones(n) > 0), share(torch.zeros(n) > 0))[1]

    assert best(NEEDED) > GAIN > best(NEEDED - 1)


def test_the_interval_of_a_difference():
    a, b = share(torch.tensor([1, 1, 1, 0]) > 0), share(torch.tensor([1, 0, 0, 0]) > 0)
    value, low, high = difference(a, b)
    assert value == 0.5
    assert -1 < low < value < high < 1
    assert difference(a, a)[1] == pytest.approx(-difference(a, a)[2], abs=0.2)


def test_the_command_gates_a_pipeline(suite, tmp_path, monkeypatch):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["audit", *map(str, arguments)])

    recipe = tmp_path / "recipe.yaml"
    expert = suite.folder / "experts" / "digits8"
    recipe.write_text(f"method: ties\nbase: {suite.folder / 'base'}\nexperts: {{digits8: {expert}}}\ndtype: float32\n")
    done = run(recipe, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["suspects"] == []
    assert "no triggers were mined" in done.stdout
    shown = run("--suite", suite.folder, "--task", "letters", "--steps", 1, "--out", tmp_path / "out")
    assert "no evidence under these probes" in shown.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"audit.json", "audit.html"}
    assert isinstance(run().exception, RecipeError)
    assert isinstance(run(recipe, "--suite", "mini").exception, RecipeError)

    class Guilty:
        suspects = ("letters",)

    monkeypatch.setattr(commands, "audit", lambda *args, **options: Guilty())
    monkeypatch.setattr(safety, "_show_audit", lambda *args: None)
    assert run("--suite", suite.folder).exit_code == 1
