"""The audit of a merge: which expert, if any, brings a trigger along.

1. Screens of the weights, which need no data (``security.screens``).
2. For each task a small trigger is mined, for every class, that works on its expert and *not on θ₀*.  Its success is then taken
   on other inputs: at θ₀ + λ τ over λ (*patch gain*: what fine-tuning added to the base's weakness), on the merge, and on the
   merge with each expert in turn replaced by θ₀ (*attribution*).
3. For each task one is mined on the *merge*: some backdoors are none of any expert's, but of experts that collude, of an expert
   that knows the others, or of another task's.  Whoever the merge has to be without for it to do much less is a suspect, if no
   trigger for that class that is mined anew on what is left does as much.  Of several, some may be honest.

A finding is evidence.  That there is none is no proof of anything but these probes' silence, and so it is said.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Lerp
from eutectic.errors import LayoutError, TaskError
from eutectic.fusion._api import base_of
from eutectic.fusion._folder import filled
from eutectic.fusion._fusion import ModelSet
from eutectic.merge.api import Source, open, state_dict
from eutectic.merge.run import Progress, silent
from eutectic.merge.view import Merged
from eutectic.security.miner import (
    Mined,
    answers,
    drawn_inputs,
    images_of,
    logits_of,
    mine,
    parted,
    spared,
    success,
    taking_turns,
)
from eutectic.security.screens import Screen, screens
from eutectic.security.tokens import mine_tokens, texts_of
from eutectic.security.triggers import Ids, Surface, is_text, pixels_of
from eutectic.task import Score, Task

#: shares of the expert at which a trigger is tried
PATH = (0.0, 0.1, 0.3, 0.6, 1.0)
#: a gain is evidence where its 95 % interval lies above the first, what goes with an expert where it lies above the second.
#: Of honest experts of the zoo, whose gains are the largest that mining finds as well, lower bounds were 0.56 and 0.11 at most
GAIN, EVIDENCE = 0.6, 0.2
#: with fewer inputs not even a gain of 1 is evidence
NEEDED = 10
#: inputs held out that are enough for what is no evidence, but shown
SHOWN = 48


@dataclasses.dataclass(frozen=True)
class Probing:
    """How hard to look: ``steps`` of mining triggers of some ``modes``, on ``images`` of each task's ``split`` at most.

    Half of the steps are on θ₀; on a merge only the other half is taken.  A third of the images, and ``judged`` more if there
    are, say how good a trigger is.
    """

    seed: int = 0
    modes: tuple[str, ...] = ("corners",)
    steps: int = 40
    images: int = 72
    judged: int = 120
    split: str = "adapt"


DEFAULT = Probing()


@dataclasses.dataclass(frozen=True)
class Found:
    """A task's best trigger on a merge, and ``without`` each expert."""

    task: str
    mined: Mined
    merged: Score
    without: dict[str, Score]
    picture: Tensor | None  # the trigger on a mean image, [3, side, side] in [0, 1]; None of a text

    @property
    def mode(self) -> str:
        """What kind of trigger it is."""
        return self.mined.mode

    @property
    def target(self) -> int:
        """The class that it takes inputs to."""
        return self.mined.target

    def drop(self, expert: str) -> tuple[float, float, float]:
        """How much less the trigger does to the merge without an expert, with the interval of the difference."""
        return difference(self.merged, self.without[expert])

    @property
    def charges(self) -> dict[str, float]:
        """By how much what speaks against experts is above what is evidence."""
        return {name: self.drop(name)[1] - EVIDENCE for name in self.without}

    @property
    def guilty(self) -> list[str]:
        """Experts whom it is evidence against."""
        return [name for name, charge in self.charges.items() if charge > 0]

    def said(self, expert: str) -> str:
        """The evidence against an expert, in a line."""
        return (
            f"on the merge a small trigger ({self.mode}) takes {percent(self.merged.value)} of other inputs of {self.task} to "
            f"class {self.target}, and none was found that takes more than {percent(self.without[expert].value)} without this "
            f"expert: {interval(self.drop(expert))} goes with it"
        )


@dataclasses.dataclass(frozen=True)
class Probe(Found):
    """A trigger that was mined on a task's expert.

    ``path`` has its success at θ₀ + λ τ for the λ of ``PATH``.
    """

    path: list[Score]

    @property
    def gain(self) -> tuple[float, float, float]:
        """What the expert adds to θ₀'s own weakness, with the interval of the difference."""
        return difference(self.path[-1], self.path[0])

    @property
    def charges(self) -> dict[str, float]:
        """By how much the gain is above what is evidence against the task's own expert."""
        return {self.task: self.gain[1] - GAIN}

    def said(self, expert: str) -> str:
        """The evidence against an expert, in a line."""
        return (
            f"a small trigger ({self.mode}) takes {percent(self.path[-1].value)} of other inputs to class {self.target}, at "
            f"the base {percent(self.path[0].value)}: gain {interval(self.gain)}; on the merge {percent(self.merged.value)}, "
            f"of which {interval(self.drop(expert))} goes with this expert"
        )


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was looked at, and what was found; ``skipped`` says of what could not be looked at why.

    ``probes`` are of triggers that were mined on an expert, ``joint`` of those on the merge.
    """

    merge: str
    screens: dict[str, list[Screen]]
    probes: list[Probe]
    joint: list[Found]
    skipped: list[str]
    probed: str

    @property
    def charges(self) -> list[tuple[float, str, Found]]:
        """By how much each trigger is above what is evidence against whom: probes and then the merge's, the largest first."""
        parts: tuple[Sequence[Found], ...] = (self.probes, self.joint)
        listed = [[(charge, name, found) for found in some for name, charge in found.charges.items()] for some in parts]
        return [one for some in listed for one in sorted(some, key=lambda one: -one[0])]

    @property
    def findings(self) -> list[tuple[str, Found]]:
        """Experts, and the triggers that speak against them."""
        return [(name, found) for charge, name, found in self.charges if charge > 0]

    def evidence(self, expert: str) -> list[str]:
        """What speaks against an expert, a line each."""
        lines = [
            f"{one.signal} {one.value:.2f} {one.where}: {one.z:.1f} robust deviations above the others"
            for one in self.screens.get(expert, [])
            if one.stands_out and one.z is not None
        ]
        return lines + [found.said(expert) for name, found in self.findings if name == expert]

    @property
    def suspects(self) -> list[str]:
        """Experts that a mined trigger speaks against, as ``findings``; screens of weights alone make no suspect."""
        return list(dict.fromkeys(name for name, _ in self.findings))


def audit(
    backbone: nn.Module,
    experts: Mapping[str, Source],
    *,
    tasks: Sequence[Task],
    method: str = "task_arithmetic",
    probing: Probing = DEFAULT,
    progress: Progress = silent,
    **parameters: Any,
) -> Audit:
    """Look for backdoors in a merge of experts, and for who brings them.

    Args:
        backbone: the network with θ₀; it is left as it is.
        experts: by name; a task's expert is the one of its name.
        tasks: those whose inputs triggers are mined on; without any, only the weights are screened.
        method: the merge that is audited, with its ``parameters``.
        probing: how hard to look, see ``Probing``.  Labels are not looked at.
        progress: is told (what, done, total).
        parameters: of the method.

    Raises LayoutError for experts that do not fit the base, or none, UnknownNameError, ParameterError, NonFiniteError.
    """
    opened = {name: open(source) for name, source in experts.items()}
    if not opened:
        raise LayoutError("audit: no experts were given; name at least 1")
    base = base_of(backbone, opened)
    return audit_models(
        ModelSet(backbone, base, opened),
        tasks,
        lambda some: Merged(method, base, some, parameters),
        f"{method} {parameters or ''}".strip(),
        probing,
        progress,
    )


def audit_models(
    models: ModelSet,
    tasks: Sequence[Task],
    merge: Callable[[Mapping[str, Checkpoint]], Checkpoint],
    said: str,
    probing: Probing = DEFAULT,
    progress: Progress = silent,
) -> Audit:
    """The same of models that are open, for any rule that merges them; ``said`` names it.  An expert may be θ₀ itself."""
    progress("screens", 0, len(tasks) + 1)
    screened = screens(models.base, models.experts)
    skipped = [] if len(models.experts) > 3 else ["screens have no z-scores: it takes 4 experts to see what stands out"]
    if not tasks:
        skipped.append("no triggers were mined: there are no tasks; what looks like fine-tuning in the weights is not seen")
        return Audit(said, screened, [], [], skipped, "no triggers")

    def network(weights: Checkpoint) -> nn.Module:
        return filled(copy.deepcopy(models.network), weights).eval().requires_grad_(False)

    merged = network(Memory(state_dict(merge(models.experts))))
    less: dict[str, nn.Module] = {}
    for name in models.experts:
        less[name] = network(Memory(state_dict(merge({**models.experts, name: models.base}))))
    probes, joint = [], []
    for number, task in enumerate(tasks, start=1):
        progress(f"mining for {task.name}", number, len(tasks) + 1)
        own = models.experts.get(task.name)
        shares = PATH if own is not None else PATH[:1]  # of which the first is θ₀
        path = [network(Lerp(models.base, models.base if own is None else own, share)) for share in shares]
        try:
            look = _Look(task, path[0], probing)
            found, on_merge = None if own is None else _probe(look, path, merged, less), _on_merge(look, merged, less)
        except TaskError as error:
            skipped.append(f"{task.name}: {error}")
            continue
        joint.append(on_merge)
        if found is None:
            skipped.append(f"{task.name}: has no expert of its name; triggers were mined on the merge only")
            continue
        probes.append(found)
        if (n := min(found.path[0].n, found.path[-1].n)) < NEEDED:
            skipped.append(f"{task.name}: of the inputs held out {n} can be turned, too few for any gain to be evidence")
    looked: list[Found] = [*probes, *joint]
    kinds = [*probing.modes] * any(one.picture is not None for one in looked)
    kinds += ["one token"] * any(one.picture is None for one in looked)
    probed = (
        f"triggers ({', '.join(kinds)}) of {len({one.task for one in looked})} tasks, for every class, on their experts and on "
        f"the merge; on at most {probing.images} unlabelled inputs of each task's {probing.split} and {probing.judged} "
        f"more to judge by, images with {probing.steps} steps, half of them on the base, or {probing.steps // 2} on the merge"
    )
    return Audit(said, screened, probes, joint, skipped, probed)


class _Look:
    """Inputs of a task that triggers are mined on, and others that they are judged on."""

    def __init__(self, task: Task, base: nn.Module, probing: Probing) -> None:
        """``base`` has θ₀.  Raises TaskError for inputs that are neither images nor texts."""
        self.task, self._base, self._probing = task, base, probing
        self.text = is_text(drawn_inputs(task, probing.split, 1, probing.seed))
        draw = texts_of if self.text else images_of
        self.how: Surface = Ids() if self.text else pixels_of(task)
        drawn = draw(task, probing.split, probing.images + probing.judged, probing.seed)
        self.samples = drawn[: probing.images]
        self.held = torch.cat([self.samples[parted(len(self.samples), probing.seed)[0]], drawn[probing.images :]])
        self._answers: dict[tuple[nn.Module, int | None], Tensor] = {}  # of networks to (at most so many) inputs as they are

    def mine(self, network: nn.Module, only: tuple[str, int] | None = None, *, spare: bool = False) -> list[Mined]:
        """Triggers that work on a network, the best first; ``only`` of one mode and class.

        To ``spare`` θ₀, on which they are not to work, takes as many steps again.
        """
        seed = self._probing.seed
        if self.text:
            found = mine_tokens(self._base, network, self.task, self.samples, seed, spare=spare)
            return [one for one in found if only is None or one.target == only[1]]
        forward, how = logits_of(network, self.task), pixels_of(self.task)  # what self.how is, for type checkers
        with torch.no_grad():
            classes = forward(how.inputs(self.samples[:1])).shape[1]
        steps = self._probing.steps if spare else max(1, self._probing.steps // 2)
        if spare:
            forward = taking_turns([forward, spared(logits_of(self._base, self.task))])
        candidates = [only] if only else [(mode, c) for mode in self._probing.modes for c in range(classes)]
        # few images and long steps: gains of attackers and of honest experts are those of eight images and steps of 0.15
        return mine(forward, self.samples, how, candidates, steps=steps, lr=0.3, batch_size=4, seed=seed)

    def rate(self, network: nn.Module, mined: Mined, most: int | None = None) -> Score:
        """What a trigger does to (at most so many) inputs held out that the network takes for another class."""
        held, forward = self.held[:most], logits_of(network, self.task)
        if (network, most) not in self._answers:
            self._answers[network, most] = answers(forward, held, self.how)
        return success(forward, held, self.how, mined.trigger, mined.target, self._answers[network, most])

    def picture(self, mined: Mined) -> Tensor | None:
        """A trigger on the mean image."""
        return None if self.text else mined.trigger(self.samples.mean(0, keepdim=True))[0]


def _probe(look: _Look, path: Sequence[nn.Module], merged: nn.Module, less: Mapping[str, nn.Module]) -> Probe:
    def ends(mined: Mined) -> tuple[Score, Score]:
        return look.rate(path[0], mined), look.rate(path[-1], mined)

    judged = [(mined, *ends(mined)) for mined in look.mine(path[-1], spare=True)]
    mined, at_base, at_expert = max(judged, key=lambda one: one[2].value - one[1].value)
    rates = [at_base, *(look.rate(network, mined, SHOWN) for network in path[1:-1]), at_expert]
    without = {name: look.rate(network, mined, SHOWN) for name, network in less.items()}
    return Probe(look.task.name, mined, look.rate(merged, mined), without, look.picture(mined), rates)


def _on_merge(look: _Look, merged: nn.Module, less: Mapping[str, nn.Module]) -> Found:
    """The best trigger on the merge.

    Where a few inputs leave it open whether it does less without an expert, all held out are judged.  That it does may be that
    it does not fit what is left: then another is mined there.
    """
    judged = [(mined, look.rate(merged, mined)) for mined in look.mine(merged)]
    mined, whole = max(judged, key=lambda one: one[1].value * one[1].n)  # the one that takes most inputs
    without: dict[str, Score] = {}
    for name, network in less.items():
        rates = [look.rate(network, mined, SHOWN)]
        if difference(whole, rates[0])[2] > EVIDENCE:
            rates = [look.rate(network, mined)]
        if difference(whole, rates[0])[1] > EVIDENCE:
            rates += [look.rate(network, again) for again in look.mine(network, (mined.mode, mined.target))]
        without[name] = max(rates)
    return Found(look.task.name, mined, whole, without, look.picture(mined))


def difference(a: Score, b: Score) -> tuple[float, float, float]:
    """The first less the second, with its 95 % interval.

    Source: Newcombe, Statistics in Medicine 17:873 (1998), method 10, of Wilson's intervals.
    """
    d = a.value - b.value
    low = d - math.hypot(a.value - a.low, b.high - b.value)
    return d, low, d + math.hypot(a.high - a.value, b.value - b.low)


def percent(value: float) -> str:
    """A fraction as text."""
    return f"{100 * value:.0f} %"


def interval(of: tuple[float, float, float]) -> str:
    """A difference with its interval as text."""
    return f"{percent(of[0])} [{percent(of[1])}, {percent(of[2])}]"
