"""The audit of a merge: which expert, if any, brings a trigger along.

1. Screens of the weights, which need no data (``security.screens``).
2. For each task a small trigger is mined that works on its expert *and* on the merge, for every class.  Its success is then
   taken on other images: at θ₀ + λ τ over λ (*patch gain*: what fine-tuning added to the base's weakness), on the merge, and on
   the merge with each expert in turn replaced by θ₀ (*attribution*).

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
from eutectic.security.miner import Forward, Mined, drawn_inputs, images_of, logits_of, mine, parted, success, taking_turns
from eutectic.security.screens import Screen, screens
from eutectic.security.tokens import mine_tokens, texts_of
from eutectic.security.triggers import Ids, Surface, is_text, pixels_of
from eutectic.task import Score, Task

#: shares of the expert at which a trigger is tried
PATH = (0.0, 0.1, 0.3, 0.6, 1.0)
#: a gain is evidence where its 95 % interval lies above this
EVIDENCE = 0.25


@dataclasses.dataclass(frozen=True)
class Probing:
    """How hard to look: ``steps`` of mining triggers of some ``modes``, on ``images`` of each task's ``split`` at most."""

    seed: int = 0
    modes: tuple[str, ...] = ("corners",)
    steps: int = 40
    images: int = 72
    split: str = "adapt"


DEFAULT = Probing()


@dataclasses.dataclass(frozen=True)
class Probe:
    """A task's best trigger.  ``path`` has its success at θ₀ + λ τ for the λ of ``PATH``, ``without`` by expert."""

    task: str
    mined: Mined
    path: list[Score]
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

    @property
    def gain(self) -> tuple[float, float, float]:
        """What the expert adds to θ₀'s own weakness, with the interval of the difference."""
        return difference(self.path[-1], self.path[0])

    def drop(self, expert: str) -> tuple[float, float, float]:
        """How much less the trigger does to the merge without an expert, with the interval of the difference."""
        return difference(self.merged, self.without[expert])


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was looked at, and what was found; ``skipped`` says of what could not be looked at why."""

    merge: str
    screens: dict[str, list[Screen]]
    probes: list[Probe]
    skipped: list[str]
    probed: str

    def evidence(self, expert: str) -> list[str]:
        """What speaks against an expert, a line each."""
        lines = [
            f"{one.signal} {one.value:.2f} {one.where}: {one.z:.1f} robust deviations above the others"
            for one in self.screens.get(expert, [])
            if one.stands_out and one.z is not None
        ]
        for probe in self.probes:
            if probe.task != expert:
                continue
            gain, low, high = probe.gain
            if low > EVIDENCE:
                drop, drop_low, drop_high = probe.drop(expert)
                lines.append(
                    f"a small trigger ({probe.mode}) takes {percent(probe.path[-1].value)} of other inputs to class "
                    f"{probe.target}, at the base {percent(probe.path[0].value)}: gain {percent(gain)} "
                    f"[{percent(low)}, {percent(high)}]; on the merge {percent(probe.merged.value)}, of which "
                    f"{percent(drop)} [{percent(drop_low)}, {percent(drop_high)}] goes with this expert"
                )
        return lines

    @property
    def suspects(self) -> list[str]:
        """Experts that a mined trigger speaks against, the largest gain first; screens of weights alone make no suspect."""
        found = [probe for probe in self.probes if probe.gain[1] > EVIDENCE]
        return [probe.task for probe in sorted(found, key=lambda probe: -probe.gain[0])]


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
        probing: how hard to look, see ``Probing``.  Labels are not looked at; a third of the images judges the triggers.
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
        return Audit(said, screened, [], skipped, "no triggers")

    def network(weights: Checkpoint) -> nn.Module:
        return filled(copy.deepcopy(models.network), weights).eval().requires_grad_(False)

    merged = network(Memory(state_dict(merge(models.experts))))
    less: dict[str, nn.Module] = {}
    for name in models.experts:
        less[name] = network(Memory(state_dict(merge({**models.experts, name: models.base}))))
    probes = []
    for number, task in enumerate(tasks, start=1):
        progress(f"mining for {task.name}", number, len(tasks) + 1)
        if task.name not in models.experts:
            skipped.append(f"{task.name}: has no expert of its name")
            continue
        path = [network(Lerp(models.base, models.experts[task.name], share)) for share in PATH]
        try:
            found = _probe(task, path, merged, less, probing)
        except TaskError as error:
            skipped.append(f"{task.name}: {error}")
            continue
        if found is None:
            skipped.append(f"{task.name}: the networks take every held-out image for one class, so there is nothing to turn")
        else:
            probes.append(found)
    kinds = [*probing.modes] * any(probe.picture is not None for probe in probes)
    kinds += ["one token"] * any(probe.picture is None for probe in probes)
    probed = (
        f"triggers ({', '.join(kinds)}) of {len(probes)} tasks, for every class; on at most {probing.images} unlabelled inputs "
        f"of each task's {probing.split}, images with {probing.steps} steps"
    )
    return Audit(said, screened, probes, skipped, probed)


def _probe(
    task: Task,
    path: Sequence[nn.Module],
    merged: nn.Module,
    less: Mapping[str, nn.Module],
    probing: Probing,
) -> Probe | None:
    """None if no trigger can be judged."""
    along = [logits_of(network, task) for network in path]
    whole = logits_of(merged, task)
    text = is_text(drawn_inputs(task, probing.split, 1, probing.seed))
    if text:
        samples = texts_of(task, probing.split, probing.images, probing.seed)
        how: Surface = Ids()
        found = mine_tokens(path[0], [path[-1], merged], task, samples, probing.seed)
    else:
        samples, how = images_of(task, probing.split, probing.images, probing.seed), pixels_of(task)
        with torch.no_grad():
            classes = whole(how.inputs(samples[:1])).shape[1]
        candidates = [(mode, c) for mode in probing.modes for c in range(classes)]
        turns = taking_turns([along[-1], whole])
        found = mine(turns, samples, how, candidates, steps=probing.steps, seed=probing.seed)
    held = samples[parted(len(samples), probing.seed)[0]]

    def rate(forward: Forward, mined: Mined) -> Score | None:
        return success(forward, held, how, mined.trigger, mined.target)

    best: tuple[float, Mined, list[Score]] | None = None
    for mined in found:
        rates = [rate(forward, mined) for forward in along]
        kept = [one for one in rates if one is not None]
        if len(kept) == len(rates) and (best is None or kept[-1].value - kept[0].value > best[0]):
            best = (kept[-1].value - kept[0].value, mined, kept)
    if best is None:
        return None
    _, mined, rates = best
    on_merge, without = rate(whole, mined), {name: rate(logits_of(net, task), mined) for name, net in less.items()}
    if on_merge is None or any(one is None for one in without.values()):
        return None
    picture = None if text else mined.trigger(samples.mean(0, keepdim=True))[0]
    return Probe(task.name, mined, rates, on_merge, {n: s for n, s in without.items() if s}, picture)


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
