"""Defences: that each does what its equation says.  How well they defend is measured, not tested: docs/safety.md."""

import dataclasses
import math

import pytest
import torch
from tests.bench.cuts import cut

from eutectic.bench import zoo
from eutectic.checkpoint.views import Lerp
from eutectic.errors import ParameterError, TaskError, UnknownNameError
from eutectic.fusion._api import fit, fused
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.merge.view import Merged
from eutectic.security.audit import Found, Probe
from eutectic.security.defences import attribution_gate as gate_file
from eutectic.security.defences import defence_ladder as ladder_file
from eutectic.security.defences import lfpm as lfpm_file
from eutectic.security.defences import tbar as tbar_file
from eutectic.security.defences._defended import Climbing, Held
from eutectic.security.metrics import share
from eutectic.security.miner import Mined
from eutectic.security.triggers import patch
from eutectic.task import Task

TASKS = ["letters", "digits8"]
OVER = {"method": "task_arithmetic", "parameters": {"scale": 0.3}}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return zoo.open_suite(str(cut(tmp_path_factory.mktemp("suite"), TASKS, {"train": 4, "val": 4, "adapt": 12, "test": 12})))


@pytest.fixture(scope="module")
def models(suite):
    return ModelSet(suite.backbone(), suite.base, suite.experts())


def same(left, right, tolerance=1e-6):
    return all(torch.allclose(left.read(name), right.read(name), atol=tolerance) for name in left.specs)


@pytest.fixture
def suspicion(suite, monkeypatch):
    """The audit's finding, a trigger of digits8 that takes most inputs to class 3."""
    rate = share(torch.arange(8) < 6)
    mined = Mined("corners", 3, patch(42, 6), rate, torch.zeros(()))
    probe = Probe("digits8", mined, rate, {}, torch.zeros(3, 42, 42), [share(torch.arange(8) < 0)] * 4 + [rate])

    def known(found):
        for file in (gate_file, tbar_file):
            monkeypatch.setattr(file, "suspicions", lambda *args, **options: [("digits8", probe)] if found else [])

    return known


def test_clipping_shortens_the_longest_alone_and_undoes_an_amplification(suite):
    experts = suite.experts()
    long = {"letters": experts["letters"], "digits8": experts["digits8"], "more": Lerp(suite.base, experts["digits8"], 4.0)}
    artefact = fit("norm_clip", ModelSet(suite.backbone(), suite.base, long), [], OVER, Run())
    gates = artefact.tensors.read("gates")
    norms = torch.tensor(artefact.about["norms"], dtype=torch.float64)
    assert torch.allclose(gates, (norms.median() / norms).clamp(max=1))
    assert float(gates[2]) < 1
    assert float(gates.min() * norms[gates.argmin()]) == pytest.approx(float(norms.median()))
    clipped = long | {"more": Lerp(suite.base, long["more"], float(gates[2]))}
    assert same(fused(suite.base, long, artefact), Merged("task_arithmetic", suite.base, clipped, OVER["parameters"]), 1e-5)


@pytest.mark.parametrize("name", ["attribution_gate", "tbar"])
def test_without_evidence_a_merge_is_left_as_it_is(suite, models, suspicion, name):
    suspicion(False)
    artefact = fit(name, models, suite.tasks, OVER, Run())
    plain = Merged("task_arithmetic", suite.base, suite.experts(), OVER["parameters"])
    assert same(fused(suite.base, suite.experts(), artefact), plain)


def test_a_suspect_is_turned_down_until_triggers_do_no_more_than_without_him(suite, models, suspicion, monkeypatch):
    suspicion(True)
    rates = iter([0.1, 0.9, 0.4])  # without the expert, and at each gate
    monkeypatch.setattr(gate_file, "mined_success", lambda *args: 0.0)
    monkeypatch.setattr(gate_file, "weakness", lambda *args: next(rates))
    artefact = fit("attribution_gate", models, suite.tasks, OVER, Run())
    assert artefact.tensors.read("gates").tolist() == [1.0, 0.0]
    assert artefact.about["suspects"] == ["digits8"]
    alone = Merged("task_arithmetic", suite.base, suite.experts() | {"digits8": suite.base}, OVER["parameters"])
    assert same(fused(suite.base, suite.experts(), artefact), alone)


def test_of_two_suspects_with_one_backdoor_both_are_turned_down(suite, models, monkeypatch):
    mined = Mined("corners", 3, patch(42, 6), None, torch.zeros(()))
    finding = Found("digits8", mined, share(torch.ones(1) > 0), {}, torch.zeros(3, 42, 42))
    monkeypatch.setattr(gate_file, "suspicions", lambda *args, **options: [("letters", finding), ("digits8", finding)])
    seen = []

    def gates_of(base, experts, artefact):
        seen.append(artefact.tensors.read("gates").tolist())
        return base

    monkeypatch.setattr(gate_file, "gated", gates_of)
    monkeypatch.setattr(gate_file, "mined_success", lambda *args: 0.0)
    monkeypatch.setattr(gate_file, "weakness", lambda *args: max(seen[-1]))  # either of them is enough
    artefact = fit("attribution_gate", models, suite.tasks, OVER, Run())
    assert seen[0] == [0.0, 0.0]
    assert artefact.tensors.read("gates").tolist() == [0.0, 0.0]


def test_a_merge_is_as_weak_as_the_better_of_two_triggers(suite, models, monkeypatch):
    task = suite.task("digits8")
    one = Mined("corners", 3, patch(42, 6), None, torch.zeros(()))
    probe, seen = Found("digits8", one, share(torch.ones(1) > 0), {}, torch.zeros(3, 42, 42)), []
    batches = Batches(Run(), [task], 1)

    def mined(network, batches, run, task, candidates, steps):
        seen.append((task.name, candidates, steps))
        return Held(task.name, one._replace(mode="again"))

    done = {"corners": 0.2, "again": 0.7}
    monkeypatch.setattr(gate_file, "held_trigger", mined)
    monkeypatch.setattr(gate_file, "mined_success", lambda network, batches, probes, run: done[probes[0].mined.mode])
    assert gate_file.weakness(models.network, batches, Run(), task, probe, 7) == 0.7
    assert seen == [("digits8", [("corners", 3)], 7)]
    assert gate_file.weakness(models.network, batches, Run(), task, dataclasses.replace(probe, picture=None), 7) == 0.2


def test_what_a_trigger_teaches_is_taken_away(suite, models, suspicion, monkeypatch):
    suspicion(True)
    monkeypatch.setattr(tbar_file, "SCALES", (1.0,))
    artefact = fit("tbar", models, suite.tasks, OVER | {"steps": 2, "lr": 1e-4, "batch_size": 4, "budget": 1.0}, Run())
    looked = artefact.about["looked"]
    assert looked[0][:2] == [0.0, 1.0] or looked[0][:2] == (0.0, 1.0)  # at α = 0 nothing has changed
    assert artefact.about["alpha"] == min(looked, key=lambda line: line[2])[0]
    assert looked[1][2] <= looked[0][2]  # unteaching a trigger does not make it work better


LEARN = {
    "i_bau": {"rounds": 1, "inner": 1, "steps": 1},
    "dam": {"steps": 1},
    "dam_single_mask": {"steps": 1},
    "awm": {"steps": 1},
    "ft_sam": {"steps": 1},
    "lfpm": {"steps": 1, "mining": 1, "budget": 1.0, "most": 0.0},
}


@pytest.mark.parametrize(("name", "some"), LEARN.items())
def test_defences_that_learn_are_seeded_and_change_what_they_should(suite, models, name, some, monkeypatch):
    monkeypatch.setattr(lfpm_file, "SHARES", (1.0,))  # whatever the choice
    monkeypatch.setattr(Climbing, "held_out", lambda self: math.nan)
    given = OVER | some | {"batch_size": 2}
    first, again = (fused(suite.base, suite.experts(), fit(name, models, suite.tasks, given, Run())) for _ in range(2))
    assert same(first, again, 0.0)
    assert first.specs == suite.base.specs
    plain = Merged("task_arithmetic", suite.base, suite.experts(), OVER["parameters"])
    assert not same(first, plain, 0.0)
    assert same(first, plain, 0.05)


def test_defences_need_images(suite, models):
    task = suite.task("letters")
    blind = Task("letters", task.head, adapt=task.arrays("adapt"))
    for name in LEARN.keys() - {"ft_sam"}:
        with pytest.raises(TaskError, match="not known to be images"):
            fit(name, models, [blind], OVER | ({"steps": 1, "batch_size": 2}), Run())


def test_the_ladder_stops_at_the_first_rung_that_holds(suite, models, monkeypatch):
    monkeypatch.setattr(ladder_file, "held_triggers", lambda *args: [])
    rates = iter([0.5, 0.5, 0.02])  # of doing nothing, and of each rung
    monkeypatch.setattr(ladder_file, "mined_success", lambda *args: next(rates))
    rungs = {"rungs": ["wag", "norm_clip", "tbar"], "budget": 1.0}
    artefact = fit("defence_ladder", models, suite.tasks, OVER | rungs, Run())
    about = artefact.about
    assert [line["rung"] for line in about["tried"]] == ["none", "wag", "norm_clip"]
    assert (about["rung"], about["held"]) == ("norm_clip", True)
    alone = fit("norm_clip", models, suite.tasks, OVER, Run())
    assert same(fused(suite.base, suite.experts(), artefact), fused(suite.base, suite.experts(), alone))


def test_a_ladder_of_which_no_rung_holds_says_so_and_takes_the_best_within_the_budget(suite, models, monkeypatch):
    monkeypatch.setattr(ladder_file, "held_triggers", lambda *args: [])
    rates, agreements = iter([0.5, 0.1, 0.3]), iter([0.8, 0.6, 0.8])
    monkeypatch.setattr(ladder_file, "mined_success", lambda *args: next(rates))
    monkeypatch.setattr(ladder_file, "agreement", lambda *args: next(agreements))
    artefact = fit("defence_ladder", models, suite.tasks, OVER | {"rungs": ["wag", "norm_clip"]}, Run())
    assert (artefact.about["rung"], artefact.about["held"]) == ("norm_clip", False)


def test_a_rung_that_is_no_defence_is_refused(suite, models):
    for name in ("fisher", "defence_ladder", "norm_clipp"):
        with pytest.raises(ParameterError, match=f"{name!r} is no defence"):
            fit("defence_ladder", models, suite.tasks, OVER | {"rungs": [name]}, Run())


def test_both_masks_of_dam_have_the_gradient_of_autograd():
    """Of L = Σ c ⊙ θ, θ = θ₀ + m̂₁ ⊙ m̂₂ ⊙ τ, by the logits of each mask."""
    from eutectic.fusion._concrete import logit_gradient, rescaled, sampled

    random = torch.Generator().manual_seed(0)
    x = [torch.randn(30, dtype=torch.float64, generator=random).requires_grad_() for _ in range(2)]
    tau, c = (torch.randn(30, dtype=torch.float64, generator=random) for _ in range(2))
    u = [torch.rand(30, dtype=torch.float64, generator=random) for _ in range(2)]
    soft = [((logit + noise.logit()) / 0.5).sigmoid() for logit, noise in zip(x, u, strict=True)]
    scaled = [m / m.mean() for m in soft]
    (c * scaled[0] * scaled[1] * tau).sum().backward()
    for own, other in ((0, 1), (1, 0)):
        gradient = (c * tau * scaled[other]).detach()
        found = logit_gradient(gradient, scaled[own].detach(), float(soft[own].detach().mean()), 0.5)
        assert torch.allclose(found, x[own].grad, atol=1e-10)
    mask, mean = rescaled(sampled(torch.zeros(1000, dtype=torch.float64), 0.5, random))
    assert float(mask.mean()) == pytest.approx(1.0)
    assert 0.4 < mean < 0.6


@pytest.mark.parametrize("name", ["awm", "dam", "dam_single_mask", "i_bau", "lfpm"])
def test_a_mode_of_triggers_that_there_is_not_is_refused_by_name(name, suite, models):
    with pytest.raises(UnknownNameError, match="Did you mean 'corners'"):
        fit(name, models, [suite.task(task) for task in TASKS], OVER | {"mode": "corner"}, Run())
