"""Distil many into one: a student learns what a fused, combined or ensembled model predicts, on inputs that need no labels.

N = inputs, C = classes; T = tasks, each with its own head.  Nothing here knows what the teacher is.

Sources: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, arXiv:1503.02531.  Differs from the
paper in that no labels are used, and in that the factor T² is left out: Adam's steps do not depend on the loss's unit.  Mixed
inputs: Zhang et al., "mixup", ICLR 2018, arXiv:1710.09412, with the teacher's answers in the place of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from eutectic.errors import NonFiniteError, TaskError
from eutectic.task import Task
from eutectic.tuning.trainer import Training, fine_tune

Teacher = Callable[[Tensor], Tensor]
Progress = Callable[[int, float], None]


class Taught:
    """Inputs ``[N, …]`` and what a teacher says of them, probabilities ``[N, C]``."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        """Hold by reference."""
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        """How many."""
        return len(self.inputs)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Those at ``index``."""
        return self.inputs[index], self.targets[index]


class Mixed:
    """Samples of which each is mixed with another one, λ x + (1 − λ) x', and its target likewise; λ ~ U(0, 1)."""

    def __init__(self, samples: Taught, seed: int) -> None:
        """The seed fixes partners and λ."""
        self.samples, self._noise = samples, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """How many."""
        return len(self.samples)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Those at ``index``, each with one drawn for it."""
        drawn = torch.randint(len(self), (len(index),), generator=self._noise)
        share = torch.rand(len(index), generator=self._noise)

        def between(one: Tensor, other: Tensor) -> Tensor:
            return torch.lerp(other, one, share.to(one).view(-1, *[1] * (one.ndim - 1)))

        (x, p), (y, q) = self.samples.take(index), self.samples.take(drawn)
        return between(x, y), between(p, q)


@torch.no_grad()
def taught(teacher: Teacher, inputs: Tensor, temperature: float = 1.0, batch_size: int = 256) -> Taught:
    """Ask a teacher, which gives logits or log-probabilities ``[B, C]``; a higher temperature flattens what it says.

    Raises TaskError without inputs, NonFiniteError for answers that are NaN.
    """
    if not len(inputs):
        raise TaskError("distillation needs inputs, labelled or not: there are none")
    said = torch.cat([teacher(batch).float() for batch in inputs.split(batch_size)])
    targets = (said / temperature).softmax(1)
    if targets.isnan().any():
        raise NonFiniteError(
            f"the teacher's answers to {int(targets.isnan().any(1).sum())} of {len(inputs)} inputs are no numbers"
        )
    return Taught(inputs, targets)


def distil(
    teacher: Teacher,
    student: nn.Module,
    inputs: Tensor,
    training: Training,
    *,
    temperature: float = 1.0,
    mixed: bool = False,
    progress: Progress = lambda step, loss: None,
) -> None:
    """Train a student ``[B, …] → [B, C]`` in place to say what the teacher says: min KL(p^(T) ‖ q^(T)) over the inputs.

    ``mixed`` inputs, images for instance, are ``Mixed``: worth having where there are few and the student learns for long.
    Without any data, inputs can be draws from parties' densities (``Ensemble.draw``).
    Raises TaskError without inputs, NonFiniteError for a teacher that answers NaN.
    """
    samples = taught(teacher, inputs, temperature)
    shown = Mixed(samples, training.seed) if mixed else samples
    fine_tune(student, lambda logits: logits / temperature, shown, training, progress)


def distil_experts(
    experts: Mapping[str, nn.Module],
    tasks: Sequence[Task],
    student: nn.Module,
    training: Training,
    *,
    split: str = "adapt",
    progress: Progress = lambda step, loss: None,
) -> None:
    """Train one backbone in place to say, under each task's own head, what that task's expert says under it.

    A batch mixes the tasks, in proportion to the inputs that they show.  Raises TaskError for a task without expert or inputs.
    """
    parts = []
    for task in tasks:
        if task.name not in experts:
            raise TaskError(f"task {task.name!r} has no expert of its name; there are {', '.join(experts)}")
        expert, arrays = experts[task.name].eval(), task.arrays(split)
        inputs = torch.cat([x for x, _ in arrays.batches(256)]) if len(arrays) else torch.empty(0)
        parts.append(taught(lambda x, expert=expert, head=task.head: head(expert(x)), inputs))
    # each answer in the columns of its own task: a softmax over blocks that are normalised each differs by log T, a constant
    whole = torch.block_diag(*(part.targets for part in parts))
    together = Taught(torch.cat([part.inputs for part in parts]), whole)

    def heads(features: Tensor) -> Tensor:
        return torch.cat([task.head(features).log_softmax(1) for task in tasks], 1)

    fine_tune(student, heads, together, training, progress)
