"""What an attack or a defence is worth: attack success rate, robust accuracy, transfer to other tasks, and DER.

Rates are taken over inputs that are *not* of the target class: one that is would count as a success of the trigger.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from eutectic.errors import TaskError
from eutectic.record import wilson
from eutectic.security.triggers import Trigger, made_of
from eutectic.task import Score, Task


class Attacked(NamedTuple):
    """ASR: the share of triggered inputs, not of the target class, that are taken for it; ``robust``: taken for their own."""

    asr: Score
    robust: Score


@torch.no_grad()
def predictions(backbone: nn.Module, task: Task, trigger: Trigger | None = None, split: str = "test") -> tuple[Tensor, Tensor]:
    """Predicted classes ``[N]`` and labels ``[N]``, with the trigger on every input if there is one.

    Raises TaskError for an empty split, and for a trigger on what are neither images nor texts.
    """
    found, labels = [], []
    for inputs, known in task.batches(split):
        if trigger is not None:
            inputs = trigger.on(inputs, made_of(task, inputs))
        found.append(task.head(backbone(inputs)).argmax(1))
        labels.append(known)
    if not sum(map(len, labels)):
        raise TaskError(f"task {task.name!r}: the split {split!r} is empty")
    return torch.cat(found), torch.cat(labels)


def attacked(backbone: nn.Module, task: Task, trigger: Trigger, target: int, split: str = "test") -> Attacked | None:
    """ASR and robust accuracy; None if every input is of the target class.  Raises as ``predictions`` does."""
    return rates(*predictions(backbone, task, trigger, split), target)


def rates(predicted: Tensor, labels: Tensor, target: int) -> Attacked | None:
    """The same of predicted classes ``[N]`` and labels ``[N]``."""
    others = labels != target
    if not others.any():
        return None
    return Attacked(share(predicted[others] == target), share(predicted[others] == labels[others]))


def transfer(clean: Tensor, triggered: Tensor, labels: Tensor, classes: int) -> tuple[float, int]:
    """What a trigger does to a task that it was not made for: the most that any class gains by it, and which class.

    Of the predictions ``[N]`` without and with it: max over c of P(triggered = c | y ≠ c) − P(clean = c | y ≠ c).
    """
    gains = []
    for c in range(classes):
        others = labels != c
        gained = int((triggered[others] == c).sum()) - int((clean[others] == c).sum())
        gains.append(gained / max(1, int(others.sum())))
    best = max(range(classes), key=gains.__getitem__)
    return gains[best], best


def der(accuracy_before: float, accuracy_after: float, asr_before: float, asr_after: float) -> float:
    """Defence effectiveness rating, [max(0, ΔASR) − max(0, ΔACC) + 1] / 2, of fractions; 0.5 is what doing nothing gets.

    Source: Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization", ICCV 2023,
    arXiv:2304.11823.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, accuracy_before - accuracy_after) + 1) / 2


def share(hits: Tensor) -> Score:
    """The share of true entries of ``[n]``, with its interval; of none anything from 0 to 1 may be."""
    good, n = int(hits.sum()), len(hits)
    return Score(good / n, *wilson(good, n), n) if n else Score(0.0, 0.0, 1.0, 0)
