"""The miner: universal triggers that take a network's inputs to a class, for many classes and kinds of trigger at once.

A candidate is a (mode, class) pair with parameters z.  All candidates share each batch of images, and one backward pass:

    min_z  mean over x of  CE( head(f(T_z(x))), c )

Every so many steps the worse half of each mode's classes is given up (successive halving), so that the steps go where a trigger
is.  How good a trigger is, is then said of images that it was not mined on.  Needs inputs, but no labels.

T_z works on pixels and stays in [0, 1].  Modes differ in where a trigger may be and how strong: what is found in one and not in
another is a finding about the mode, so a defence keeps at least one out to be judged by.

Sources: Wang et al., Neural Cleanse, IEEE S&P 2019 (a trigger for each class); Jamieson & Talwalkar, AISTATS 2016,
arXiv:1502.07943 (successive halving).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import TaskError, UnknownNameError, did_you_mean
from eutectic.fusion._fit import generator
from eutectic.security.metrics import share
from eutectic.security.triggers import Surface, Trigger, corner, pixels_of
from eutectic.task import Pixels, Score, Task
from eutectic.tuning.trainer import multiplies_bfloat16

#: inputs ``[B, …]`` → logits ``[B, C]``
Forward = Callable[[Tensor], Tensor]


class Mode(NamedTuple):
    """A family of triggers.

    ``knots(side)`` is the shape of one candidate's z, ``change`` makes of z ``[N, *knots]`` and pixels ``[B, 3, H, W]`` the
    triggered pixels ``[N, B, 3, H, W]``.
    """

    knots: Callable[[int], tuple[int, ...]]
    change: Callable[[Tensor, Tensor], Tensor]


def _whole(side: int) -> tuple[int, ...]:
    return (3, side, side)


def _painted(mask_of: Callable[[int], Tensor]) -> Mode:
    """Any colours where the mask ``[side, side]`` is 1."""

    def change(z: Tensor, x: Tensor) -> Tensor:
        return x + mask_of(x.shape[-1]) * (z.sigmoid()[:, None] - x)

    return Mode(_whole, change)


def _added(most: float, cells: int | None = None) -> Mode:
    """At most ``most`` on top of each value; smoothly between ``cells``² knots if there are any."""

    def change(z: Tensor, x: Tensor) -> Tensor:
        delta = z.tanh()
        if cells is not None:
            delta = F.interpolate(delta, x.shape[-2:], mode="bilinear", align_corners=False)
        return (x + most * delta[:, None]).clamp(0, 1)

    return Mode(_whole if cells is None else lambda side: (3, cells, cells), change)


def _square(side: int, share: float) -> int:
    return max(1, round(side * share))


def corners(side: int) -> Tensor:
    """The mask of a square of a fourteenth of the side in each corner."""
    one = corner(side, _square(side, 1 / 14))
    return (one + one.flip(0) + one.flip(1) + one.flip(0, 1)).clamp(max=1)


def frame(side: int) -> Tensor:
    """The mask of a frame of a fortieth of the side."""
    width = _square(side, 1 / 40)
    mask = torch.ones(side, side)
    mask[width : side - width, width : side - width] = 0
    return mask


def centre(side: int) -> Tensor:
    """The mask of a square of a seventh of the side in the middle."""
    size = _square(side, 1 / 7)
    low = (side - size) // 2
    mask = torch.zeros(side, side)
    mask[low : low + size, low : low + size] = 1
    return mask


def windows(least: float, most: float) -> Mode:
    """A picture over the whole image, of which each image shows one square of ``least`` to ``most`` of the side.

    Which one, follows from the image itself: one picture covers triggers of many sizes and places, and is still a function.
    """

    def change(z: Tensor, x: Tensor) -> Tensor:
        side = x.shape[-1]
        size, top, left = _numbers(x, 3).unbind(1)
        size = (side * (least + (most - least) * size)).round().clamp(1, side)
        rows, columns = (_stretch((side - size).mul(at).round(), size, side) for at in (top, left))
        mask = (rows[:, :, None] & columns[:, None, :]).to(x.dtype)[:, None]
        return x + mask * (z.sigmoid()[:, None] - x)

    return Mode(_whole, change)


def _numbers(x: Tensor, n: int) -> Tensor:
    """Numbers ``[B, n]`` in [0, 1) that follow from each image and look drawn."""
    flat = x.detach().double().flatten(1)
    weights = torch.cos(torch.arange(flat.shape[1] * n, dtype=torch.float64).view(-1, n) ** 1.5)
    return (1000 * flat @ weights.to(flat)).remainder(1)


def _stretch(first: Tensor, size: Tensor, side: int) -> Tensor:
    """Which of ``side`` places lie from ``first`` on, ``size`` of them: ``[B, side]``."""
    places = torch.arange(side, device=first.device)
    return (places >= first[:, None]) & (places < (first + size)[:, None])


def lower_right(size: int) -> Mode:
    """One patch in the lower right corner, where attacks of the literature have theirs."""
    return _painted(lambda side: corner(side, size))


#: all but the last so small that few networks are taken in without a backdoor: a large enough trigger works on any.  The last
#: is for defences, which have to cover the triggers of others
MODES: dict[str, Mode] = {
    "corners": _painted(corners),
    "frame": _painted(frame),
    "centre": _painted(centre),
    "additive": _added(6 / 255),
    "smooth": _added(0.08, cells=6),
    "windows": windows(0.1, 0.3),
}


def mode_of(name: str, modes: Mapping[str, Mode] = MODES) -> Mode:
    """A family of triggers by its name.  Raises UnknownNameError."""
    if name not in modes:
        raise UnknownNameError(f"no mode of triggers is called {name!r}.{did_you_mean(name, modes)}")
    return modes[name]


class Mined(NamedTuple):
    """A trigger, the class that it takes inputs to, and its success on held-out images that the network takes for another.

    ``z`` are its parameters.
    """

    mode: str
    target: int
    trigger: Trigger
    success: Score
    z: Tensor


def mine(
    forward: Forward,
    pixels: Tensor,
    how: Pixels,
    candidates: Sequence[tuple[str, int]],
    *,
    modes: Mapping[str, Mode] = MODES,
    steps: int = 40,
    lr: float = 0.15,
    batch_size: int = 8,
    keep: int = 1,
    seed: int = 0,
) -> list[Mined]:
    """Triggers of the best ``keep`` classes of each mode, the best first.

    Args:
        forward: gives logits; its parameters need no gradient.
        pixels: unlabelled images ``[N, 3, H, W]`` in [0, 1]; a third of them is held out to say how good a trigger is.
        how: how the network's inputs are made of pixels.
        candidates: (mode, class) pairs.
        modes: by name.
        steps: of Adam, for those that are kept to the end; the others get fewer.
        lr: Adam's, on z.
        batch_size: images a candidate and step.
        keep: classes of each mode that are never given up.
        seed: fixes the result.

    Raises UnknownNameError, and TaskError for fewer than three images or no candidates.
    """
    for mode, _ in candidates:
        mode_of(mode, modes)
    if len(pixels) < 3 or not candidates:
        raise TaskError(f"{len(pixels)} images and {len(candidates)} candidates: mining needs at least 3 and 1")
    held, learn = parted(len(pixels), seed)
    noise = generator(seed, "z")
    alive = [
        _Candidate(mode, target, torch.randn(modes[mode].knots(pixels.shape[-1]), generator=noise))
        for mode, target in candidates
    ]
    rungs = list(_rungs(alive, steps, keep))
    for number, length in enumerate(rungs):
        for candidate in alive:
            candidate.z = candidate.z.detach().clone().requires_grad_()
            candidate.loss = 0.0
        optimiser = torch.optim.Adam([candidate.z for candidate in alive], lr=lr)
        for _ in range(length):
            index = learn[torch.randint(len(learn), (batch_size,), generator=noise)]
            losses = _losses(forward, pixels[index], how, modes, alive)
            zs = [candidate.z for candidate in alive]
            for z, slope in zip(zs, torch.autograd.grad(losses.sum(), zs), strict=True):  # the network's weights get none
                z.grad = slope
            optimiser.step()
            for candidate, loss in zip(alive, losses.tolist(), strict=True):
                candidate.loss = loss if candidate.loss == 0.0 else 0.7 * candidate.loss + 0.3 * loss
        if number + 1 < len(rungs):
            alive = _better_half(alive, keep)
    found = [_judged(forward, pixels[held], how, modes, candidate) for candidate in alive]
    return sorted(found, key=lambda one: -one.success.value)


def logits_of(network: nn.Module, task: Task) -> Forward:
    """A task's logits by a network, in bfloat16 where the processor has instructions for it."""

    def forward(inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
            features = network(inputs)
        return task.head(features.float())

    return forward


def spared(forward: Forward) -> Forward:
    """Logits whose cross-entropy is low where the network does *not* take inputs for a class: log(1 − p).

    The softmax of log(1 − p) over C classes is (1 − p) / (C − 1), and so the loss of class c is −log(1 − p_c) + log(C − 1).
    """

    def others(inputs: Tensor) -> Tensor:
        logits = forward(inputs)
        each = logits[:, None].masked_fill(torch.eye(logits.shape[1], dtype=torch.bool), -math.inf)
        return each.logsumexp(2) - logits.logsumexp(1, keepdim=True)

    return others


def images_of(task: Task, split: str, most: int, seed: int = 0) -> Tensor:
    """At most so many images of a split as pixels, drawn without replacement.  Raises TaskError if they are no images."""
    how, inputs = pixels_of(task), drawn_inputs(task, split, most, seed)
    if inputs.ndim != 4 or inputs.shape[2] != inputs.shape[3]:
        raise TaskError(f"task {task.name!r}: inputs {tuple(inputs.shape)} are no square images [B, C, side, side]")
    return how.of(inputs)


def drawn_inputs(task: Task, split: str, most: int, seed: int) -> Tensor:
    """At most so many inputs of a split, drawn without replacement."""
    arrays = task.arrays(split)
    return arrays.take(torch.randperm(len(arrays), generator=generator(seed, task.name, "images"))[:most])[0]


def parted(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of n images triggers are judged on, a third, and which they are mined on."""
    order = torch.randperm(n, generator=generator(seed, "mine"))
    return order[: n // 3], order[n // 3 :]


def taking_turns(forwards: Sequence[Forward]) -> Forward:
    """One network after the other, a batch each: what is mined has to work on all of them."""
    turns = itertools.cycle(forwards)
    return lambda inputs: next(turns)(inputs)


def answers(forward: Forward, images: Tensor, how: Surface) -> Tensor:
    """The class that a network takes each image for."""
    with torch.no_grad():
        return forward(how.inputs(images)).argmax(1)


def success(
    forward: Forward, images: Tensor, how: Surface, trigger: Trigger, target: int, clean: Tensor | None = None
) -> Score:
    """The share of images that a trigger takes to a class, among those that the network takes for another.

    ``clean`` are the network's ``answers`` without it, if they are known.
    """
    others = (answers(forward, images, how) if clean is None else clean) != target
    return share(answers(forward, trigger(images[others]), how) == target if others.any() else others[:0])


class _Candidate:
    def __init__(self, mode: str, target: int, z: Tensor) -> None:
        self.mode, self.target, self.z, self.loss = mode, target, z, 0.0


def _rungs(alive: Sequence[_Candidate], steps: int, keep: int) -> Iterator[int]:
    """Lengths that sum to ``steps``: the early ones, with many candidates, shorter."""
    most = max(sum(other.mode == one.mode for other in alive) for one in alive)
    halvings = max(0, math.ceil(math.log2(most / keep))) if most > keep else 0
    share_ = max(1, steps // (halvings + 2))
    for _ in range(halvings):
        yield share_
    yield max(1, steps - halvings * share_)


def _better_half(alive: Sequence[_Candidate], keep: int) -> list[_Candidate]:
    found = []
    for mode in dict.fromkeys(candidate.mode for candidate in alive):
        own = sorted((candidate for candidate in alive if candidate.mode == mode), key=lambda one: one.loss)
        found += own[: max(keep, math.ceil(len(own) / 2))]
    return found


def _losses(forward: Forward, pixels: Tensor, how: Pixels, modes: Mapping[str, Mode], alive: Sequence[_Candidate]) -> Tensor:
    """The loss of each candidate, ``[N]``."""
    changed = torch.cat([modes[one.mode].change(one.z[None], pixels)[0] for one in alive])
    logits = forward(how.inputs(changed))
    wanted = torch.tensor([one.target for one in alive]).repeat_interleave(len(pixels))
    return F.cross_entropy(logits, wanted, reduction="none").view(len(alive), -1).mean(1)


def trigger_of(mode: Mode, z: Tensor, name: str) -> Trigger:
    """The trigger with parameters z."""
    z = z.detach()

    def change(x: Tensor, strength: float) -> Tensor:
        return x + strength * (mode.change(z[None], x)[0] - x)

    return Trigger(name, change)


def _judged(forward: Forward, held: Tensor, how: Pixels, modes: Mapping[str, Mode], one: _Candidate) -> Mined:
    trigger = trigger_of(modes[one.mode], one.z, one.mode)
    return Mined(one.mode, one.target, trigger, success(forward, held, how, trigger, one.target), one.z.detach())
