"""Weights of task vectors without gradients, from a few labelled samples."""

import sys

import pytest
import torch
from tests.fusion.networks import base_of, experts_of, head_of, inputs_of, network_of

from eutectic.checkpoint.base import Memory
from eutectic.errors import MissingDependencyError, NonFiniteError, TaskError
from eutectic.fusion import _api
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.fusion.lorahub import SPLIT
from eutectic.merge.api import state_dict
from eutectic.task import Arrays, Task

cma = pytest.importorskip("cma")

PLANTED = (1.0, -0.5)


def setting(n=40, experts=("a", "b"), planted=PLANTED):
    """A task that no expert is named for, and whose labels are what one weighted sum of the task vectors predicts."""
    network, width = network_of("awkward")
    models = ModelSet(network, base_of(network), experts_of(network, experts, noise=0.4))
    head, inputs = head_of(width, 3), inputs_of("awkward", n)
    weights = {}
    for name in models.base.specs:
        start = models.base.read(name)
        steps = [w * (expert.read(name) - start) for w, expert in zip(planted, models.experts.values(), strict=True)]
        weights[name] = start + sum(steps) if start.dtype.is_floating_point else start
    fill(network, Memory(weights))
    labels = head(network(inputs)).argmax(1).detach()
    fill(network, models.base)
    return models, Task("new", head, **{SPLIT: Arrays(inputs, labels)})


def loss(models, task, weights):
    network, _ = network_of("awkward")
    fill(network, weights)
    return torch.nn.functional.cross_entropy(task.head(network(task.arrays(SPLIT).inputs)), task.arrays(SPLIT).labels).item()


def fit(models, task, run=None, **parameters):
    return _api.fit("lorahub", models, [task], parameters, run or Run())


def test_it_finds_weights_that_are_better_than_base_experts_and_average_on_a_task_that_no_expert_knows():
    models, task = setting()
    artefact = fit(models, task, generations=25, shots=40, penalty=0.0)
    weights = artefact.tensors.read("weights")
    assert (weights[:, 0] - torch.tensor(PLANTED)).abs().max() < 0.8
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    found = loss(models, task, _api.fused(models.base, models.experts, artefact))
    mean = {name: torch.stack([e.read(name) for e in models.experts.values()]).double().mean(0) for name in models.base.specs}
    for other in (models.base, *models.experts.values(), Memory(mean)):
        assert found < loss(models, task, other) - 0.01
    best = [line[1] for line in artefact.about["history"]]
    assert best == sorted(best, reverse=True)
    assert best[-1] == pytest.approx(found, rel=1e-4)
    assert "40 labelled samples of each task's val" in artefact.about["notes"]


def test_weights_are_bounded_and_a_penalty_keeps_the_base():
    models, task = setting(planted=(4.0, -4.0))
    assert fit(models, task, bound=0.25, penalty=0.0).tensors.read("weights").abs().max() <= 0.25
    artefact = fit(models, task, penalty=1e4)
    assert not artefact.tensors.read("weights").any()
    kept = state_dict(_api.fused(models.base, models.experts, artefact))
    for name, tensor in ((name, kept[name]) for group in artefact.about["names"] for name in group):
        torch.testing.assert_close(tensor, models.base.read(name))


def test_seeds_and_shots_decide_and_an_interrupted_search_is_carried_on(tmp_path):
    models, task = setting()
    whole = fit(models, task, shots=12).tensors.read("weights")
    assert torch.equal(fit(models, task, shots=12).tensors.read("weights"), whole)
    assert not torch.equal(fit(models, task, Run(seed=1), shots=12).tensors.read("weights"), whole)
    before = torch.random.get_rng_state()

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        fit(models, task, Run(folder=tmp_path, progress=stop), shots=12)
    passes = []
    handle = models.network.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(fit(models, task, Run(folder=tmp_path), shots=12).tensors.read("weights"), whole)
    handle.remove()
    assert len(passes) == 1 + 6 * 6  # the base again, and six generations of six
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_expert_is_scaled():
    models, task = setting(experts=("a",), planted=(1.0,))
    weight = fit(models, task, shots=40, penalty=0.0).tensors.read("weights")[0, 0]
    assert 0.2 < weight <= 1.5


def test_what_it_cannot_do_is_said(monkeypatch):
    models, task = setting()
    with pytest.raises(TaskError, match="'new' has no split 'val'"):
        fit(models, Task("new", task.head, adapt=task.arrays(SPLIT)))
    broken = Task("new", lambda features: features * torch.nan, **{SPLIT: task.arrays(SPLIT)})
    with pytest.raises(NonFiniteError, match="task 'new': the loss is nan already under the base"):
        fit(models, broken)
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'eutectic\[lorahub\]'"):
        fit(models, task)


def test_an_artefact_says_which_labels_it_saw():
    models, task = setting()
    arrays = task.arrays(SPLIT)
    other = Task("new", task.head, **{SPLIT: Arrays(arrays.inputs, (arrays.labels + 1) % 3)})
    seen = [fit(models, one, generations=1).about["seen"] for one in (task, other)]
    assert seen[0] != seen[1]
