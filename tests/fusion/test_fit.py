"""Batches, descent, resumption and processes."""

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, network_of, tasks_of

from eutectic.errors import NonFiniteError, ParameterError, StoppedError, TaskError
from eutectic.fusion import _api, _fit
from eutectic.fusion._fit import EVERY, HELD_OUT, Batches, descend
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.merge.api import state_dict
from eutectic.task import Arrays, Task

METHODS = {
    "adamerging": {"steps": 45, "lr": 0.02},
    "concrete_adamerging": {"steps": 25, "mask_steps": 25, "mask_lr": 0.1},
    "concrete_task_arithmetic": {"steps": 25, "lr": 0.1},
    "expert_adamerging": {"steps": 25},
    "pwe_moe": {"steps": 25, "scalarisation": "epo"},
}


def samples(n):
    return Arrays(torch.arange(n, dtype=torch.float64)[:, None].expand(n, 4).contiguous(), torch.zeros(n, dtype=torch.long))


def task(name, n):
    return Task(name, lambda features: features, adapt=samples(n), test=samples(n + 1))


def taken(batches, task, steps):
    return torch.cat([batches.index(task, step) for step in range(steps)]).tolist()


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "held"), [(1, 0), (3, 0), (7, 1), (40, 10), (400, HELD_OUT)])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_an_epoch_takes_every_sample_once_but_those_held_out(n, held, size):
    one = task("t", n)
    batches = Batches(Run(), [one], size)
    kept = batches.held_out["t"].tolist()
    assert len(kept) == held
    learn = sorted(set(range(n)) - set(kept))
    order = taken(batches, one, 3 * n)
    for epoch in range(3):
        assert sorted(order[epoch * len(learn) : (epoch + 1) * len(learn)]) == learn
    if len(learn) > 6:
        assert order[: len(learn)] != order[len(learn) : 2 * len(learn)]
    assert torch.equal(batches.inputs(one, batches.index(one, 2))[:, 0].long(), batches.index(one, 2))


def test_batches_are_a_function_of_seed_task_and_step_alone():
    first, second = task("a", 40), task("b", 40)
    batches = Batches(Run(seed=4), [first, second], 8)
    expected = {name: [batches.index(one, step).tolist() for step in range(20)] for name, one in (("a", first), ("b", second))}
    again = Batches(Run(seed=4), [second, first], 8)
    for step in reversed(range(20)):
        assert again.index(first, step).tolist() == expected["a"][step]
        assert again.index(second, step).tolist() == expected["b"][step]
    assert expected["a"] != expected["b"]
    other = Batches(Run(seed=5), [first], 8)
    assert [other.index(first, step).tolist() for step in range(20)] != expected["a"]
    assert other.held_out["a"].tolist() != batches.held_out["a"].tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_each_batch(world, monkeypatch):
    one = task("t", 27)
    alone = Batches(Run(), [one], 8)
    expected = [sorted(alone.index(one, step).tolist()) for step in range(9)]
    found = [[] for _ in expected]
    monkeypatch.setattr(_fit, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(_fit, "rank", lambda rank=rank: rank)
        batches = Batches(Run(), [one], 8)
        assert torch.equal(batches.held_out["t"], alone.held_out["t"])
        for step, part in enumerate(found):
            share = batches.index(one, step).tolist()
            assert len(share) == 8 // world
            part += share
    assert [sorted(part) for part in found] == expected
    with pytest.raises(ParameterError, match=r"batch_size = 6.*4 processes|batch_size = 7.*2 processes"):
        Batches(Run(), [one], 6 if world == 4 else 7)


def test_the_protocol_says_which_split_is_seen():
    one = task("t", 12)
    assert len(Run(protocol="inductive").arrays(one)) == 12
    assert len(Run(protocol="transductive").arrays(one)) == 13
    with pytest.raises(TaskError, match=r"'t'.*no split 'adapt'"):
        Batches(Run(), [Task("t", lambda features: features, test=samples(3))], 4)
    with pytest.raises(TaskError, match=r"'t'.*'adapt' is empty"):
        Batches(Run(), [Task("t", lambda features: features, adapt=samples(0))], 4)


# ── descent ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def towards(target, state, criterion=None, noise=0.1):
    """Gradients of a noisy quadratic, and how far the state is from the target."""

    def gradients(step):
        random = torch.Generator().manual_seed(step)
        error = state["x"] - target + noise * torch.randn(state["x"].shape, generator=random, dtype=state["x"].dtype)
        return float(error.square().sum()), {"x": 2 * error, "idle": torch.zeros_like(state["idle"])}

    return gradients, criterion or (lambda: float((state["x"] - target).square().sum()))


def fresh():
    return {"x": torch.zeros(3, dtype=torch.float64), "idle": torch.ones(2, 2)}


TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def run_descent(run, steps=90, patience=50, state=None, criterion=None):
    state = state or fresh()
    return descend("things", state, *towards(TARGET, state, criterion), run, steps=steps, lr=0.05, patience=patience)


def test_descent_finds_the_minimum_and_keeps_the_best_state():
    state = fresh()
    found = run_descent(Run(), state=state)
    assert [step for step, *_ in found.history] == [0, 20, 40, 60, 80, 90]
    values = [value for *_, value in found.history]
    assert values[-1] < 0.1 * values[0]
    best = float((found.tensors["x"] - TARGET).square().sum())
    assert best == min(values)
    assert torch.equal(found.tensors["idle"], torch.ones(2, 2))


def test_it_stops_when_nothing_gets_better_and_gives_the_best_not_the_last():
    looks, state = iter([5.0, 3.0, 4.0, 3.5, 3.25, 1.0]), fresh()
    seen = []

    def criterion():
        seen.append(state["x"].clone())
        return next(looks)

    found = run_descent(Run(), steps=1000, patience=3, state=state, criterion=criterion)
    assert [value for *_, value in found.history] == [5.0, 3.0, 4.0, 3.5, 3.25]
    assert torch.equal(found.tensors["x"], seen[1])
    assert not torch.equal(found.tensors["x"], state["x"])


def test_without_held_out_samples_the_last_state_is_taken():
    state = fresh()
    found = run_descent(Run(), patience=1, state=state, criterion=lambda: math.nan)
    assert len(found.history) == 6
    assert torch.equal(found.tensors["x"], state["x"])


class Stop:
    """Interrupts at a step, as a person would."""

    def __init__(self, at):
        self.at, self.seen = at, []

    def __call__(self, what, done, total):
        self.seen.append(done)
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 19, 20, 47, 89, 90])
def test_descent_carries_on_after_an_interruption_to_the_same_bits(at, tmp_path):
    whole = run_descent(Run(folder=tmp_path / "whole"))
    stop = Stop(at)
    with pytest.raises(KeyboardInterrupt):
        run_descent(Run(folder=tmp_path / "part", progress=stop))
    stop.at = None
    again = run_descent(Run(folder=tmp_path / "part", progress=stop))
    first = (at - 1) // EVERY * EVERY  # the step's own look comes after its progress
    assert stop.seen[at:] == list(range(first + 1, 91))
    assert again.history == whole.history
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    done = run_descent(Run(folder=tmp_path / "part", progress=Stop(1)))  # complete: no step is left
    assert torch.equal(done.tensors["x"], whole.tensors["x"])


def test_a_gradient_that_is_not_finite_is_refused_and_what_is_kept_is_good(tmp_path):
    run = Run(folder=tmp_path)
    for bad in (3, 39):  # a look follows the latter
        state = fresh()
        gradients, criterion = towards(TARGET, state)

        def broken(step, gradients=gradients, bad=bad):
            value, found = gradients(step)
            return value, found | {"x": found["x"] * (math.nan if step == bad else 1)}

        if bad == 3:
            with pytest.raises(NonFiniteError, match="things, step 3: .* its gradient by 'x'"):
                descend("things", state, broken, criterion, run, steps=90, lr=0.05, patience=50)
        else:
            best = descend("things", state, broken, criterion, run, steps=90, lr=0.05, patience=50)
            assert [step for step, *_ in best.history] == [0, 20]
            assert "things, step 39" in str(run.stopped.pop())
    assert json.loads((tmp_path / "things" / "state.json").read_text())["step"] == 20
    assert torch.equal(run_descent(run).tensors["x"], run_descent(Run()).tensors["x"])


# ── methods ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def setting():
    network, width = network_of("awkward", torch.float32)
    base, experts = base_of(network), experts_of(network)
    return ModelSet(network, base, experts), tasks_of("awkward", width, dtype=torch.float32)


def fitted(setting, name, run=None, **changes):
    return _api.fit(name, *setting, METHODS[name] | {"batch_size": 4} | changes, run or Run())


def equal(left, right):
    a, b = state_dict(left.tensors), state_dict(right.tensors)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_repeats_another_does_not_and_the_processes_random_numbers_are_left_alone(name, setting):
    before = torch.get_rng_state()
    first = fitted(setting, name, Run(seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = fitted(setting, name, Run(seed=1))
    assert equal(first, again)
    assert first.about == again.about
    assert not equal(first, fitted(setting, name, Run(seed=2)))


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_that_was_interrupted_is_carried_on_to_the_same_artefact(name, setting, tmp_path):
    whole = fitted(setting, name)
    stop = Stop(22)
    with pytest.raises(KeyboardInterrupt):
        fitted(setting, name, Run(folder=tmp_path, progress=stop))
    stop.at, begun = None, len(stop.seen)
    again = fitted(setting, name, Run(folder=tmp_path, progress=stop))
    assert 21 in stop.seen[begun:]
    assert equal(again, whole)
    assert again.about == whole.about
    other = fitted(setting, name, Run(seed=1, folder=tmp_path))  # another fit in the same folder keeps to itself
    assert equal(other, fitted(setting, name, Run(seed=1)))


@pytest.mark.parametrize("name", METHODS)
def test_held_out_samples_are_never_learned_from(name, setting):
    models, tasks = setting
    batches = Batches(Run(), tasks, 4)
    expected = fitted(setting, name)
    replaced = []
    for one in tasks:
        held, splits = batches.held_out[one.name], one.arrays("adapt")
        inputs = splits.inputs.clone()
        inputs[held] = 7.0  # another look may choose another step, but of the same path
        replaced.append(Task(one.name, one.head, adapt=Arrays(inputs, splits.labels)))
    losses = [
        [loss for _, loss, _ in fit.about["history"]]
        for fit in (expected, fitted((models, replaced), name, patience=50), fitted(setting, name, patience=50))
    ]
    if name == "concrete_adamerging":  # the second phase stands on a mask that the held-out samples have chosen
        losses = [
            [loss for _, loss, _ in fit.about["mask_history"]]
            for fit in (expected, fitted((models, replaced), name, patience=50), fitted(setting, name, patience=50))
        ]
    assert losses[1] == losses[2]


def test_a_loss_that_is_not_finite_names_task_and_step_and_the_state_before_is_kept(setting, tmp_path):
    models, tasks = setting
    good, calls = tasks[1].head, []

    def bad(features):
        calls.append(1)
        logits = good(features)
        return logits * (math.nan if len(calls) == 28 else 1)

    sick = Task("b", bad, adapt=tasks[1].arrays("adapt"))
    run = Run(folder=tmp_path)
    with pytest.raises(StoppedError, match=r"step 25: task 'b'") as stopped:  # two looks, and steps 0 to 24 before
        fitted((models, [tasks[0], sick]), "adamerging", run)
    assert equal(stopped.value.artefact, fitted(setting, "adamerging", steps=20))
    assert _api.fused(models.base, models.experts, stopped.value.artefact).specs == models.base.specs
    (state,) = tmp_path.rglob("state.json")
    assert json.loads(state.read_text())["step"] == 20
    healed = fitted(setting, "adamerging", run)
    assert equal(healed, fitted(setting, "adamerging"))


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CHILD = """
import sys, torch
from pathlib import Path
from tests.fusion.networks import base_of, experts_of, network_of, tasks_of
from eutectic.checkpoint.base import Memory
from eutectic.fusion import _api
from eutectic.fusion._fusion import ModelSet, Run
torch.set_num_threads(1)
out, name, parameters = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
network, width = network_of("awkward", torch.float32)
models = ModelSet(network, base_of(network), experts_of(network))
tasks = tasks_of("awkward", width, dtype=torch.float32)
import os
artefact = _api.fit(name, models, tasks, parameters, Run(folder=out / "state"))
_api.save_artefact(artefact, out / ("rank" + os.environ["RANK"]))
assert not torch.distributed.is_initialized()
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamerging", "concrete_adamerging"])
def test_two_processes_fit_what_one_does(name, setting, tmp_path):
    parameters = METHODS[name] | {"batch_size": 4}
    alone = fitted(setting, name)
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, "."])
    command = [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path), name, repr(parameters)]
    pair = [
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=100)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    first, second = (_api.load_artefact(tmp_path / f"rank{rank}") for rank in "01")
    assert equal(first, second)
    for tensor in alone.tensors.specs:
        torch.testing.assert_close(first.tensors.read(tensor), alone.tensors.read(tensor), rtol=1e-5, atol=2e-5)
    assert len(list((tmp_path / "state").rglob("state.json"))) == (2 if name == "concrete_adamerging" else 1)
