"""Attacks that make an expert with a backdoor, to measure defences with, on the small models of the zoo.

Both train with the trainer of honest experts, on batches of samples and some more with the trigger and the target's label:

- BadNets (Gu et al., 2017, arXiv:1708.06733) is no more than that.  Merging dilutes it.
- BadMerging, on-task (Zhang et al., CCS 2024, arXiv:2408.07362), survives it.  Its trigger is a universal patch against θ₀, and
  what the triggered samples teach is the *interpolated* feature

      r · h(θ; T(x)) + (1 − r) · h(θ₀; T(x)),     r ~ U(least, 1), one draw a batch,

  so that whatever share of the expert is left in a merge, the trigger works.

Differs from the papers in that the trigger is mined by Adam on batches, not image by image, and that the weight α of the
backdoor's loss is the number of triggered samples over that of clean ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from eutectic.bench.suite import Suite
from eutectic.errors import ParameterError
from eutectic.fusion._fit import generator
from eutectic.security.miner import images_of, logits_of, lower_right, mine
from eutectic.security.triggers import Trigger, patch, pixels_of
from eutectic.task import Pixels
from eutectic.tuning.trainer import Samples, Training, fine_tune

Kind = Literal["badnets", "badmerging"]


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack on one task: inputs with the trigger are to be taken for class ``target``.

    ``size`` is the trigger's, in pixels.  ``triggered`` samples are added to each batch of clean ones.  ``least`` is the
    smallest share r of the expert's own features that the backdoor is trained at.  ``mining`` is how many steps ``badmerging``
    takes for its trigger.
    """

    kind: Kind
    task: str
    target: int = 0
    size: int = 8
    triggered: int = 16
    least: float = 0.1
    mining: int = 150
    seed: int = 0


class Poisoned:
    """Samples, and at the end of each batch some of them again with the trigger and the target's label."""

    def __init__(self, clean: Samples, trigger: Trigger, pixels: Pixels, target: int, triggered: int) -> None:
        """``triggered`` of each batch, at most all."""
        self.clean, self.trigger, self.pixels, self.target, self.triggered = clean, trigger, pixels, target, triggered

    def __len__(self) -> int:
        """How many clean ones."""
        return len(self.clean)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Those at ``index`` ``[B]``, and the first ``triggered`` of them once more: ``[B + triggered, …]``."""
        inputs, labels = self.clean.take(index)
        again = self.trigger.on(inputs[: self.triggered], self.pixels)
        return torch.cat([inputs, again]), torch.cat([labels, torch.full_like(labels[: self.triggered], self.target)])


class Interpolated(nn.Module):
    """A backbone whose last ``triggered`` features of each batch are mixed with those of θ₀."""

    def __init__(self, backbone: nn.Module, start: nn.Module, triggered: int, least: float, seed: int) -> None:
        """``start`` has θ₀, and is not trained."""
        super().__init__()
        self.backbone, self._start = backbone, (start,)  # in a tuple: it is to get no adapters
        self._triggered, self._least, self._noise = triggered, least, generator(seed, "r")

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, …]`` → ``[B, width]``."""
        features = self.backbone(inputs)
        with torch.no_grad():
            before = self._start[0](inputs[-self._triggered :])
        r = self._least + (1 - self._least) * torch.rand((), generator=self._noise).item()
        mixed = r * features[-self._triggered :] + (1 - r) * before
        return torch.cat([features[: -self._triggered], mixed])


def trigger_for(suite: Suite, attack: Attack, images: int = 192) -> Trigger:
    """The attack's trigger: a random patch, or one mined against θ₀ on images of ``train``.

    Raises TaskError if inputs are no images, ParameterError for a class that there is not.
    """
    task = suite.task(attack.task)
    if not 0 <= attack.target < len(suite.classes[attack.task]):
        raise ParameterError(
            f"target = {attack.target}: {attack.task} has {len(suite.classes[attack.task])} classes", ("target",)
        )
    pixels = images_of(task, "train", images, attack.seed)
    if attack.kind == "badnets":
        return patch(pixels.shape[-1], attack.size, attack.seed)
    network = suite.backbone().requires_grad_(False)
    modes = {"lower right": lower_right(attack.size)}
    found = mine(
        logits_of(network, task),
        pixels,
        pixels_of(task),
        [("lower right", attack.target)],
        modes=modes,
        steps=attack.mining,
        batch_size=32,
        seed=attack.seed,
    )
    return found[0].trigger


def poisoned_backbone(
    suite: Suite,
    attack: Attack,
    trigger: Trigger,
    training: Training,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> nn.Module:
    """A backbone with the expert that the attack makes: with adapters if ``training.rank``.

    Raises ParameterError for more triggered samples than a batch has.
    """
    task = suite.task(attack.task)
    if not 0 < attack.triggered <= training.batch_size:
        raise ParameterError(f"triggered = {attack.triggered}: a batch has {training.batch_size} samples", ("triggered",))
    train = Poisoned(task.arrays("train"), trigger, pixels_of(task), attack.target, attack.triggered)
    backbone = suite.backbone()
    trained: nn.Module = backbone
    if attack.kind == "badmerging":
        trained = Interpolated(backbone, suite.backbone().requires_grad_(False), attack.triggered, attack.least, attack.seed)
    fine_tune(trained, task.head, train, training, progress)
    return backbone.eval()
