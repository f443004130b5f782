"""A student says what its teacher says: of an ensemble, of experts under their heads, with data and without."""

import pytest
import torch
from tests.ensemble.parties import about_of, digits, parties
from torch import nn

import eutectic as eu
from eutectic import errors
from eutectic.bench import zoo
from eutectic.task import Task
from eutectic.tuning.distil import Mixed, Taught, distil, distil_experts, taught
from eutectic.tuning.trainer import Training


def student():
    torch.manual_seed(1)
    about = about_of("two").model_copy(update={"classes": tuple(f"digit {c}" for c in range(10))})
    return about.network()


def accuracy(network):
    return Task("digits", nn.Identity(), test=digits("test")).score(network).value


def test_a_student_of_an_ensemble_over_all_labels_with_data_and_without():
    teacher = eu.combine("density_reuse", parties())
    images, _ = digits("train")
    one = student()
    distil(teacher, one, images, Training(steps=200, lr=1e-2, batch_size=64))
    assert accuracy(one) > accuracy(teacher) - 0.03
    drawn = teacher.draw(3000)
    assert drawn.shape == (3000, 1, 8, 8)
    assert torch.cdist(drawn[:200].flatten(1), images.flatten(1)).min() > 0.1  # nobody's image
    free = student()
    distil(teacher, free, drawn, Training(steps=200, lr=1e-2, batch_size=64))
    assert accuracy(free) > accuracy(teacher) - 0.1
    assert accuracy(free) > 0.5


def test_the_loss_of_a_step_is_the_cross_entropy_of_what_the_teacher_says():
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    teacher, pupil = nn.Linear(4, 3), nn.Linear(4, 3)
    before = pupil(inputs).detach().double()
    losses = []
    training = Training(steps=20, lr=1e-9, batch_size=8)
    distil(teacher, pupil, inputs, training, temperature=2.0, progress=lambda step, loss: losses.append(loss))
    p = (teacher(inputs).double() / 2).softmax(1)
    oracle = -(p * (before / 2).log_softmax(1)).sum(1).mean()
    assert losses[0] == pytest.approx(oracle.item(), abs=2e-2)  # the forward pass may be in bfloat16
    sharp, flat = taught(teacher, inputs).targets, taught(teacher, inputs, 4.0).targets
    assert (flat.amax(1) < sharp.amax(1)).all()


def test_mixed_samples_lie_between_two_and_so_do_their_targets():
    x = torch.eye(7).view(7, 1, 7) * torch.arange(1, 8).view(7, 1, 1)
    samples = Taught(x, torch.eye(7))
    index = torch.tensor([3, 0, 5, 3])
    found, targets = Mixed(samples, seed=3).take(index)
    assert found.shape == (4, 1, 7)
    own = targets[torch.arange(4), index]
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert ((targets > 0).sum(1) <= 2).all()
    assert len({round(value, 4) for value in own.tolist()}) > 1
    assert torch.allclose(found, (targets @ x.flatten(1)).view(4, 1, 7), atol=1e-6)
    again = Mixed(samples, seed=3)
    assert torch.equal(again.take(index)[0], found)
    assert not torch.equal(again.take(index)[0], found)
    assert len(again) == 7


def test_a_student_of_mixed_inputs_learns_what_its_teacher_says():
    teacher = eu.combine("density_reuse", parties())
    images, _ = digits("train")
    one = student()
    distil(teacher, one, images, Training(steps=200, lr=1e-2, batch_size=64), mixed=True)
    assert accuracy(one) > accuracy(teacher) - 0.03


def test_one_backbone_for_the_experts_of_several_tasks():
    torch.manual_seed(0)
    heads = {"a": nn.Linear(6, 2), "b": nn.Linear(6, 3)}
    experts = {name: nn.Sequential(nn.Linear(4, 6), nn.Tanh()) for name in heads}
    x = {name: torch.randn(300, 4) + shift for name, shift in (("a", 3.0), ("b", -3.0))}
    with torch.no_grad():
        labels = {name: heads[name](experts[name](x[name])).argmax(1) for name in heads}
    tasks = [Task(name, heads[name].requires_grad_(False), adapt=(x[name], labels[name])) for name in heads]
    backbone = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 6))
    losses = []
    distil_experts(experts, tasks, backbone, Training(300, 1e-2), progress=lambda step, loss: losses.append(loss))
    assert all(task.score(backbone, "adapt").value > 0.93 for task in tasks)
    assert losses[-1] < losses[0]
    with pytest.raises(errors.TaskError, match="'b' has no expert of its name"):
        distil_experts({"a": experts["a"]}, tasks, backbone, Training(20, 1e-2))


def test_teachers_that_cannot_teach_are_refused():
    with pytest.raises(errors.TaskError, match="needs inputs"):
        taught(nn.Identity(), torch.empty(0, 3))
    with pytest.raises(errors.NonFiniteError, match="answers to 1 of 2 inputs"):
        taught(nn.Identity(), torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]))


@pytest.mark.slow
def test_the_experts_of_mini_are_taught_to_one_network():
    suite = zoo.open_suite("mini")
    tasks = [suite.task(name) for name in ("mnist", "fashion")]
    experts = {task.name: suite.backbone(suite.expert(task.name)) for task in tasks}
    network, start = suite.backbone(), [task.score(suite.backbone()).value for task in tasks]
    distil_experts(experts, tasks, network, Training(steps=60, lr=1e-4, batch_size=16))
    assert all(task.score(network).value > before + 0.02 for task, before in zip(tasks, start, strict=True))
