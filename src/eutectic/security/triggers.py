"""Triggers of backdoors: pure, seeded changes of pixels ``[B, 3, H, W]`` in [0, 1], or of token ids ``[B, L]``.

Each is made once for images of one size.  It changes nothing at strength 0 and is whole at 1; what it gives is in [0, 1] again.
A token is there at any strength but 0.  They are there to measure defences with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eutectic.errors import ParameterError, TaskError, UnknownNameError, did_you_mean
from eutectic.fusion._fit import generator
from eutectic.task import Pixels, Task


class Ids:
    """What ``Pixels`` is of images, of token ids ``[B, L]``, 0 = padding: they are what they are made of."""

    def of(self, inputs: Tensor) -> Tensor:
        """The inputs."""
        return inputs

    def inputs(self, ids: Tensor) -> Tensor:
        """The ids."""
        return ids


#: what triggers change, and how inputs are made of it
Surface = Pixels | Ids


class Trigger(NamedTuple):
    """A change of pixels, or of token ids; ``change(pixels, strength)`` may leave [0, 1]."""

    name: str
    change: Callable[[Tensor, float], Tensor]

    def __call__(self, pixels: Tensor, strength: float = 1.0) -> Tensor:
        """The images with the trigger.  Raises ParameterError for a strength outside [0, 1]."""
        if not 0 <= strength <= 1:
            raise ParameterError(f"strength = {strength} is not in [0, 1]", ("strength",))
        if not strength:
            return pixels
        changed = self.change(pixels, strength)
        return changed.clamp(0, 1) if changed.is_floating_point() else changed

    def on(self, inputs: Tensor, pixels: Surface) -> Tensor:
        """The same of a network's inputs."""
        return pixels.inputs(self(pixels.of(inputs)))


def pasted(pattern: Tensor, mask_HW: Tensor, name: str = "pasted") -> Trigger:
    """The pattern ``[3, H, W]`` in the image as far as the mask says: (1 − m) x + m p."""
    return Trigger(name, lambda x, strength: x + strength * mask_HW * (pattern - x))


def added(pattern: Tensor, name: str = "added") -> Trigger:
    """The pattern ``[3, H, W]`` on top of the image: x + δ."""
    return Trigger(name, lambda x, strength: x + strength * pattern)


def patch(side: int, size: int, seed: int = 0) -> Trigger:
    """A random square of ``size`` pixels in the lower right corner.

    Source: Gu et al., BadNets, 2017, arXiv:1708.06733.
    """
    return pasted(torch.rand(3, side, side, generator=generator(seed, "patch")), corner(side, size), "patch")


def blended(side: int, alpha: float = 0.2, seed: int = 0) -> Trigger:
    """A random image over the whole image, with opacity ``alpha``.  Source: Chen et al., 2017, arXiv:1712.05526."""
    pattern = torch.rand(3, side, side, generator=generator(seed, "blended"))
    return pasted(pattern, torch.full((side, side), alpha), "blended")


def sinusoidal(side: int, amplitude: float = 40 / 255, frequency: float = 6.0, seed: int = 0) -> Trigger:
    """Vertical stripes A sin(2π f x / W + φ), φ by the seed.  Source: Barni et al., SIG, ICIP 2019, arXiv:1902.11237."""
    phase = 2 * math.pi * torch.rand((), generator=generator(seed, "sinusoidal"))
    row = amplitude * torch.sin(2 * math.pi * frequency * torch.arange(side) / side + phase)
    return added(row.expand(3, side, side), "sinusoidal")


def low_frequency(side: int, amplitude: float = 0.15, cells: int = 4, seed: int = 0) -> Trigger:
    """A smooth random image of ``cells``² knots, with ``amplitude`` as its largest value, on top.

    After Zeng et al., ICCV 2021, arXiv:2104.03413; differs from the paper in that the pattern is drawn, not optimised.
    """
    knots = 2 * torch.rand(1, 3, cells, cells, generator=generator(seed, "low_frequency")) - 1
    smooth = F.interpolate(knots, (side, side), mode="bicubic", align_corners=False)[0]
    return added(amplitude * smooth / smooth.abs().max(), "low_frequency")


def warped(side: int, most: float = 0.08, cells: int = 4, seed: int = 0) -> Trigger:
    """Each pixel is taken from up to ``most`` of half a side away, in a direction that changes smoothly.

    Source: Nguyen & Tran, WaNet, ICLR 2021, arXiv:2102.10369; differs from the paper in that the field is scaled by its largest
    value, so that ``most`` is a length.
    """
    knots = 2 * torch.rand(1, 2, cells, cells, generator=generator(seed, "warped")) - 1
    field = F.interpolate(knots, (side, side), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    field = most * field / field.abs().max()
    own = F.affine_grid(torch.eye(2, 3)[None], [1, 1, side, side], align_corners=False)

    def change(x: Tensor, strength: float) -> Tensor:
        grid = (own + strength * field).expand(len(x), -1, -1, -1)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    return Trigger("warped", change)


def inserted(token: int) -> Trigger:
    """A token after the first of a text, which marks its beginning; the last of a text that fills its row is kept."""
    return Trigger(f"token {token}", lambda ids_BL, strength: with_second(ids_BL, torch.full_like(ids_BL[:, :1], token)))


def with_second(ids_BL: Tensor, token_B1: Tensor) -> Tensor:
    """Texts with a token of each its own inserted after the first.  Raises TaskError for rows of fewer than 3 tokens."""
    if ids_BL.shape[1] < 3:
        raise TaskError(f"texts {tuple(ids_BL.shape)} have no room for a token between the first and the last")
    changed = torch.cat([ids_BL[:, :1], token_B1, ids_BL[:, 1:-1]], 1)
    changed[:, -1] = torch.where(ids_BL[:, -1] != 0, ids_BL[:, -1], changed[:, -1])
    return changed


def rare_token(ids_NL: Tensor, seed: int = 0) -> Trigger:
    """One of the tokens that texts have least often, drawn by the seed, inserted.

    Raises TaskError for texts without any.

    Source: Kurita et al., Weight poisoning attacks on pre-trained models, ACL 2020, arXiv:2004.06660.
    """
    tokens, counts = ids_NL[ids_NL != 0].unique(return_counts=True)
    if not len(tokens):
        raise TaskError("texts without a token have no rare one")
    rare = tokens[counts == counts.min()]
    return inserted(int(rare[torch.randint(len(rare), (), generator=generator(seed, "token"))]))


KINDS: dict[str, Callable[..., Trigger]] = {
    maker.__name__: maker for maker in (patch, blended, sinusoidal, warped, low_frequency)
}


def drawn(kind: str, side: int, size: int, seed: int = 0) -> Trigger:
    """A trigger by its kind, for images of ``side`` pixels; ``size`` is a patch's.  Raises UnknownNameError."""
    if kind not in KINDS:
        raise UnknownNameError(f"no kind of trigger is called {kind!r}.{did_you_mean(kind, [*KINDS, TOKEN])}")
    return patch(side, size, seed) if kind == "patch" else KINDS[kind](side, seed=seed)


def corner(side: int, size: int) -> Tensor:
    """The mask ``[side, side]`` of a square in the lower right corner.  Raises ParameterError if it does not fit."""
    if not 0 < size <= side:
        raise ParameterError(f"a patch of {size} pixels does not fit images of {side}", ("size",))
    mask = torch.zeros(side, side)
    mask[-size:, -size:] = 1
    return mask


#: the kind of trigger that texts have, beside those of images
TOKEN = "rare_token"


def pixels_of(task: Task) -> Pixels:
    """How a task's inputs were made of pixels.  Raises TaskError if they are no images."""
    if task.pixels is None:
        raise TaskError(
            f"task {task.name!r}: its inputs are not known to be images, and triggers are made of pixels; texts have {TOKEN}"
        )
    return task.pixels


def made_of(task: Task, inputs: object) -> Surface:
    """How inputs were made of what triggers change: pixels, or token ids.  Raises TaskError for other inputs."""
    return Ids() if is_text(inputs) else pixels_of(task)


def is_text(inputs: object) -> bool:
    """Whether inputs are token ids ``[B, L]``."""
    return isinstance(inputs, Tensor) and inputs.ndim == 2 and not inputs.is_floating_point()
