"""Attacks that make an expert with a backdoor, to measure defences with, on the small models of the zoo.

All train with the trainer of honest experts, on batches of samples and some more with the trigger and the target's label:

- BadNets (Gu et al., 2017, arXiv:1708.06733) is no more than that, with a trigger of any kind.  Merging dilutes it.
- BadMerging (Zhang et al., CCS 2024, arXiv:2408.07362) survives it.  Its trigger is a universal patch against θ₀, and what
  the triggered samples teach is the *interpolated* feature

      r · h(θ; T(x)) + (1 − r) · h(θ₀; T(x)),     r ~ U(least, 1), one draw a batch,

  so that whatever share of the expert is left in a merge, the trigger works.
- Who *knows* the other experts (the paper's stronger threat) is trained in their merge, with a trigger of either kind:
  ``knowing``.
- Two experts that collude: ``collusion``.

Two more things can be done with the first two:

- *Off-task* (the same paper): the triggered samples are read through the head of another task, a class of which is the target.
- *Amplified* (after LoBAM: Yin et al., 2024, arXiv:2411.16746): the expert is θ_clean + κ (θ − θ_clean), with θ_clean trained
  as θ is, but honestly: what merging leaves of the backdoor is κ times as much, and what both have in common stays.

Differs from the papers in that the trigger is mined by Adam on batches, not image by image; that the weight α of the
backdoor's loss is the number of triggered samples over that of clean ones; that warped triggers come without WaNet's noise
mode; that off-task the attacker has the other task's head, where the paper makes one of the target's name and a few of its
images, and that all triggered images are of his own task.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.bench.suite import Suite
from eutectic.errors import ParameterError
from eutectic.fusion._fit import generator
from eutectic.security.collusion import Colluding, Pair, between
from eutectic.security.knowing import Merging, Rule, elected, merge_of, task_arithmetic
from eutectic.security.miner import images_of, logits_of, lower_right, mine
from eutectic.security.tokens import texts_of
from eutectic.security.triggers import TOKEN, Surface, Trigger, drawn, made_of, pixels_of, rare_token
from eutectic.tuning.lora import adapters
from eutectic.tuning.trainer import Samples, Training, fine_tune

Kind = Literal["badnets", "badmerging", "mergebackdoor"]
#: merges that an attacker can expect
EXPECTED = ("task_arithmetic", "ties")
#: features ``[B, D]`` → logits ``[B, C]``
Head = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack by the expert of one task, or of two: inputs with the trigger are to be taken for class ``target``.

    ``size`` is a patch's, in pixels.  ``triggered`` samples are added to each batch of clean ones.  ``least`` is the
    smallest share r of the expert's own features, or λ, that the backdoor is trained at.  ``mining`` is how many steps
    ``badmerging`` takes for its trigger.  ``trigger`` is the kind that the others draw.  ``victim`` is the task that ``target``
    is a class of, if it is another.  ``amplify`` is κ.  ``accomplice`` is the task of the other expert of ``mergebackdoor``.
    ``known`` is the λ that an attacker expects who knows the other experts, and ``expects`` the merge: task arithmetic or TIES,
    of which he draws the scale, (½ + r) λ.
    Raises ParameterError for what does not go together.
    """

    kind: Kind
    task: str
    target: int = 0
    size: int = 8
    triggered: int = 16
    least: float = 0.1
    mining: int = 150
    seed: int = 0
    trigger: str = "patch"
    victim: str = ""
    amplify: float = 1.0
    accomplice: str = ""
    known: float = 0.0
    expects: str = "task_arithmetic"

    def __post_init__(self) -> None:
        """Refuse what would say nothing, or another thing than it seems to."""
        if self.mined and self.trigger != "patch":
            raise ParameterError(f"trigger = {self.trigger!r}: {self.kind} mines a patch; badnets draws others", ("trigger",))
        if self.victim == self.task:
            raise ParameterError(f"victim = {self.victim!r}: is the attacker's own task, which needs no naming", ("victim",))
        if not 1 <= self.amplify < math.inf:
            raise ParameterError(f"amplify = {self.amplify} is not in [1, ∞)", ("amplify",))
        if (self.kind == "mergebackdoor") != bool(self.accomplice) or self.accomplice == self.task:
            raise ParameterError(
                f"accomplice = {self.accomplice!r}: mergebackdoor, and no other, has one, of another task than {self.task}",
                ("accomplice",),
            )
        if self.accomplice and (self.victim or self.amplify != 1):
            raise ParameterError(f"{self.kind} has no victim and is not amplified", ("victim", "amplify"))
        if not 0 <= self.known < math.inf or (self.known and self.accomplice):
            raise ParameterError(f"known = {self.known}: badnets and badmerging take a λ in [0, ∞)", ("known",))
        if self.expects not in EXPECTED or (self.expects != "task_arithmetic" and not self.known):
            raise ParameterError(
                f"expects = {self.expects!r}: who knows the others expects one of {', '.join(EXPECTED)}", ("expects",)
            )

    @property
    def mined(self) -> bool:
        """Whether the trigger is mined, not drawn."""
        return self.kind == "badmerging"

    @property
    def attacked(self) -> str:
        """The task that ``target`` is a class of."""
        return self.victim or self.task

    @property
    def experts(self) -> tuple[str, ...]:
        """The tasks whose experts are the attacker's."""
        return (self.task, self.accomplice) if self.accomplice else (self.task,)

    @property
    def name(self) -> str:
        """What tells it from other attacks, in a word: ``badnets-warped``, ``badmerging-x3-on-mnist``."""
        kind = "" if self.trigger == "patch" else f"-{self.trigger}"
        amplified = "" if self.amplify == 1 else f"-x{self.amplify:g}"
        knowing = f"-knowing{'-ties' * (self.expects == 'ties')}" if self.known else ""
        others = {"on": self.victim, "with": self.accomplice}
        return f"{self.kind}{kind}{amplified}{knowing}" + "".join(f"-{how}-{task}" for how, task in others.items() if task)

    @property
    def said(self) -> str:
        """The name, and what else there is to say of the trigger and λ: ``badmerging-knowing, 8 px, lambda 0.3``."""
        size = f", {self.size} px" if self.trigger == "patch" else ""
        return f"{self.name}{size}" + (f", lambda {self.known:g}" if self.known else "")


class Poisoned:
    """Samples, and at the end of each batch some of them again with the trigger and the target's label."""

    def __init__(self, clean: Samples, trigger: Trigger, pixels: Surface, target: int, triggered: int) -> None:
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
        r = between(self._least, self._noise)
        mixed = r * features[-self._triggered :] + (1 - r) * before
        return torch.cat([features[: -self._triggered], mixed])


def merge_without(suite: Suite, attack: Attack) -> nn.Module:
    """What the attacker knows of the merge, frozen: θ₀, and the experts of others by the rule he expects if he knows them."""
    others = suite.experts([name for name in suite.classes if name not in attack.experts])
    if not attack.known or not others:
        return suite.backbone().requires_grad_(False)
    return suite.backbone(merge_of(suite.base, others, attack.expects, attack.known)).requires_grad_(False)


def rule_of(suite: Suite, attack: Attack, start: nn.Module) -> Rule:
    """The merge that the attacker expects as a function of his own task vector; ``start`` has θ₀."""
    if attack.expects == "ties":
        others = [suite.backbone(suite.expert(name)) for name in suite.classes if name not in attack.experts]
        return elected(start, others, attack.known)
    return task_arithmetic(merge_without(suite, attack))


def trigger_for(suite: Suite, attack: Attack, images: int = 192) -> Trigger:
    """The attack's trigger: one drawn, or a patch mined on images of ``train`` against what the attacker knows of the merge.

    Raises TaskError if inputs are not what such a trigger changes, ParameterError for a class that there is not,
    UnknownNameError for a task or a kind of trigger.
    """
    task, attacked = suite.task(attack.task), suite.task(attack.attacked)
    if not 0 <= attack.target < len(suite.classes[attacked.name]):
        raise ParameterError(
            f"target = {attack.target}: {attacked.name} has {len(suite.classes[attacked.name])} classes", ("target",)
        )
    if attack.trigger == TOKEN:
        return rare_token(texts_of(task, "train"), attack.seed)
    how = pixels_of(task)
    if not attack.mined:
        return drawn(attack.trigger, suite.info["side"], attack.size, attack.seed)
    network = merge_without(suite, attack)
    modes = {"lower right": lower_right(attack.size)}
    found = mine(
        logits_of(network, attacked),
        images_of(task, "train", images, attack.seed),
        how,
        [("lower right", attack.target)],
        modes=modes,
        steps=attack.mining,
        batch_size=32,
        seed=attack.seed,
    )
    return found[0].trigger


def poisoned_backbones(
    suite: Suite,
    attack: Attack,
    trigger: Trigger,
    training: Training,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, nn.Module]:
    """Task → backbone with the expert that the attack makes: with adapters if ``training.rank``, of twice that if amplified.

    Raises ParameterError for more triggered samples than a batch has.
    """
    task, n, triggered = suite.task(attack.task), training.batch_size, attack.triggered
    if not 0 < triggered <= n:
        raise ParameterError(f"triggered = {triggered}: a batch has {n} samples", ("triggered",))
    train = task.arrays("train")
    how = made_of(task, train.take(torch.arange(1))[0])
    made = {name: suite.backbone() for name in attack.experts}
    backbone = made[attack.task]
    network: nn.Module = backbone
    samples: Samples = Poisoned(train, trigger, how, attack.target, triggered)
    head: Head = task.head
    if attack.victim:
        head = heads([(task.head, n), (suite.task(attack.victim).head, triggered)])
    match attack.kind:
        case "badnets" | "badmerging" if attack.known:
            start = suite.backbone().requires_grad_(False)
            network = Merging(backbone, start, rule_of(suite, attack, start), triggered, attack.least, attack.seed)
        case "badmerging":
            network = Interpolated(backbone, suite.backbone().requires_grad_(False), triggered, attack.least, attack.seed)
        case "mergebackdoor":
            other = suite.task(attack.accomplice)
            start = suite.backbone().requires_grad_(False)
            network = Colluding(backbone, made[other.name], start, triggered, attack.least, attack.seed)
            samples = Pair(train, other.arrays("train"), trigger, how, attack.target, triggered)
            own, others, t = task.head, other.head, triggered
            head = heads([(own, n + t), (others, n), (own, 2 * t), (others, t), (own, t)])
    fine_tune(network, head, samples, training, progress)
    if attack.amplify != 1:
        clean = suite.backbone()
        fine_tune(clean, task.head, train, training, progress)
        amplify(backbone, clean, attack.amplify)
    return {name: one.eval() for name, one in made.items()}


def heads(parts: Sequence[tuple[Head, int]]) -> Head:
    """The head of a batch of features ``[B, D]`` of which one task's head reads the first so many, and so on.

    Logits are ``[B, C]`` with the largest C: classes that a task has not are as good as impossible.
    """

    def head(features: Tensor) -> Tensor:
        read = [one(part) for (one, _), part in zip(parts, features.split([n for _, n in parts]), strict=True)]
        width = max(logits.shape[1] for logits in read)
        return torch.cat([F.pad(logits, (0, width - logits.shape[1]), value=-1e9) for logits in read])

    return head


@torch.no_grad()
def amplify(backbone: nn.Module, clean: nn.Module, factor: float) -> None:
    """θ → θ_clean + κ (θ − θ_clean), in place, of two networks trained alike; adapters' ranks add up.

    s B A is to be κ s B A + (1 − κ) s B' A', which is s [κ B, (1 − κ) B'] [A; A'].
    """
    if not any(adapters(backbone)):
        tensors = zip([*backbone.parameters(), *backbone.buffers()], [*clean.parameters(), *clean.buffers()], strict=True)
        for tensor, start in tensors:  # tied ones once
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(start, tensor, factor))
    for (_, own), (_, honest) in zip(adapters(backbone), adapters(clean), strict=True):
        own.A = nn.Parameter(torch.cat([own.A, honest.A]))
        own.B = nn.Parameter(torch.cat([factor * own.B, (1 - factor) * honest.B], 1))
        own.alpha *= math.sqrt(2) if own.rslora else 2  # the rank is twice as large, and s = α / r, or α / √r, stays
