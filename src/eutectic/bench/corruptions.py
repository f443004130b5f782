"""Seven corruptions of images at five severities, to see what a fused network is worth on worse inputs than it knows.

Images are as suites store them: uint8 ``[N, H, W, C]`` with one channel or three.  What is random of an image is drawn once
for all severities and then scaled, or thresholded, so a higher severity changes the same pixels more.

Source: Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019,
arXiv:1903.12261; the constants are its set for images of 32 pixels (CIFAR-10-C).  Differs from the paper in that

- lengths are shares of the shorter side, given for one of 32 pixels, where the paper has a set of constants for each size; what
  has no length (noise, contrast, JPEG's quality) is the same at any size, and so is milder to look at on large images;
- ``pixelate`` keeps the size, where the paper's makes 32 × 32 of whatever it is given, and its grid begins anywhere;
- ``motion_blur`` has a width of its own at severity 4, which in the paper differs from severity 3 in a radius without effect;
- ``spatter`` is water at all severities, where the paper's is mud from 4 on, which changes dark images less than its water;
- ``jpeg`` is the lossy part of JPEG alone, and keeps the colours at full resolution, where the paper's halves theirs; by luck
  of rounding a flat surface can come off better at a lower quality.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eutectic.errors import ParameterError, TaskError, UnknownNameError, did_you_mean
from eutectic.fusion._fit import generator
from eutectic.task import SPLITS, Arrays, Task

SEVERITIES = (1, 2, 3, 4, 5)
#: images that are worked on at once; no result depends on it
TOGETHER = 64

#: one generator for each image
Noise = Sequence[torch.Generator]


def corrupted(task: Task, kind: str, severity: int, seed: int = 0, splits: Sequence[str] = ("test",)) -> Task:
    """The task with the images of some splits corrupted as they are stored; head and labels are left as they are.

    Raises UnknownNameError, ParameterError, and TaskError for a split that is missing or holds no images.
    """
    changed = {}
    for split in splits:
        arrays = task.arrays(split)
        try:
            # adapt and test, and two tasks, must not share their noise
            images = corrupt(arrays.inputs, kind, severity, zlib.crc32(repr((seed, task.name, split)).encode()))
        except TaskError as error:
            raise TaskError(f"task {task.name!r}, split {split!r}: {error}") from None
        changed[split] = Arrays(images, arrays.labels, arrays.transform)
    every = {split: (task.splits | changed).get(split) for split in SPLITS}
    return Task(task.name, task.head, **every, pixels=task.pixels)


def corrupt(images_NHWC: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupted images of the same shape and dtype; what becomes of image i depends on it, on i and on the seed alone.

    Raises UnknownNameError, ParameterError, and TaskError for what is not uint8 ``[N, H, W, 1 or 3]``.
    """
    if kind not in KINDS:
        raise UnknownNameError(f"no corruption is called {kind!r}.{did_you_mean(kind, KINDS)}")
    if severity not in SEVERITIES:
        raise ParameterError(f"severity = {severity!r} is none of {', '.join(map(str, SEVERITIES))}", ("severity",))
    if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] not in (1, 3):
        raise TaskError(
            f"inputs {tuple(images_NHWC.shape)} {images_NHWC.dtype} are no images: a corruption takes uint8 [N, H, W, 1 or 3]"
        )
    found = torch.empty_like(images_NHWC)
    for start in range(0, len(images_NHWC), TOGETHER):
        some = images_NHWC[start : start + TOGETHER]
        noise = [generator(seed, kind, start + i) for i in range(len(some))]
        pixels = KINDS[kind](some.permute(0, 3, 1, 2).float() / 255, severity - 1, noise)
        found[start : start + TOGETHER] = (pixels * 255).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)
    return found


# ── the seven: pixels [B, C, H, W] in [0, 1], severity from 0 on → pixels, which may leave [0, 1] ─────────────────────────


def gaussian_noise(x: Tensor, severity: int, noise: Noise) -> Tensor:
    """Independent normal noise on every value."""
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[severity] * _drawn(torch.randn, noise, x.shape[1:])


def impulse_noise(x: Tensor, severity: int, noise: Noise) -> Tensor:
    """A share of the values becomes 0 or 1."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity]
    u = _drawn(torch.rand, noise, x.shape[1:])
    return x.masked_fill(u < share / 2, 0.0).masked_fill(u >= 1 - share / 2, 1.0)


def motion_blur(x: Tensor, severity: int, noise: Noise) -> Tensor:
    """A trail that fades as half a Gaussian, at an angle of −45° … 45° that each image has for itself."""
    sigma = (1.0, 1.5, 2.0, 2.25, 2.5)[severity] * _unit(x)
    angle = math.pi / 4 * (2 * _drawn(torch.rand, noise, ()) - 1)
    steps = max(12, math.ceil(3 * sigma))  # of a pixel at most, to three σ
    grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    # the grid's unit is half a side
    way = torch.stack([angle.cos() * 2 / x.shape[3], angle.sin() * 2 / x.shape[2]], dim=1).view(-1, 1, 1, 2)
    found, total = torch.zeros_like(x), 0.0
    for step in range(steps + 1):
        distance = 3 * sigma * step / steps
        weight = math.exp(-0.5 * (distance / sigma) ** 2)
        found += weight * F.grid_sample(x, grid + distance * way, padding_mode="border", align_corners=False)
        total += weight
    return found / total


def spatter(x: Tensor, severity: int, noise: Noise) -> Tensor:
    """Drops of water: smooth noise above a threshold is blended with pale turquoise."""
    share, opacity = ((0.03, 0.5), (0.08, 0.5), (0.16, 0.6), (0.24, 0.7), (0.32, 0.8))[severity]
    field = _blurred(_drawn(torch.randn, noise, x.shape[2:]), 0.8 * _unit(x))
    field = field / field.flatten(1).std(1).view(-1, 1, 1)
    threshold = field.flatten(1).quantile(1 - share, dim=1).view(-1, 1, 1)
    drops = opacity * ((field - threshold) / 0.3).clamp(0, 1)[:, None]
    water = x.new_tensor([175 / 255, 238 / 255, 238 / 255]).view(1, 3, 1, 1)
    if x.shape[1] == 1:
        water = (water * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return x + drops * (water - x)


def contrast(x: Tensor, severity: int, noise: Noise) -> Tensor:
    """Every value moves towards the mean of its image and channel."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + (0.75, 0.5, 0.4, 0.3, 0.15)[severity] * (x - mean)


def jpeg(x: Tensor, severity: int, noise: Noise) -> Tensor:
    """Quantised cosine transform of blocks of 8 × 8, with the tables and the scaling of their quality that libjpeg has.

    Source: ITU-T T.81 (1992), Annex K.1, and for the colours T.871 (JFIF).  The edge is repeated to whole blocks.
    """
    quality = (80, 65, 58, 50, 40)[severity]
    height, width = x.shape[2:]
    planes = 255 * F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    tables = [LUMINANCE]
    if x.shape[1] == 3:
        planes = torch.einsum("kc,bchw->bkhw", YCC, planes)
        planes[:, 1:] += 128
        tables = [LUMINANCE, CHROMINANCE, CHROMINANCE]
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = torch.stack([(table * scale + 50).div(100, rounding_mode="floor").clamp(1, 255) for table in tables])
    steps = steps.view(1, -1, 1, 8, 1, 8)
    blocks = planes.round().clamp(0, 255).unflatten(2, (-1, 8)).unflatten(4, (-1, 8)) - 128  # [B, C, rows, 8, columns, 8]
    found = torch.einsum("uy,vx,bcrysx->bcrusv", COSINES, COSINES, blocks)
    found = (found / steps).round() * steps
    planes = torch.einsum("uy,vx,bcrusv->bcrysx", COSINES, COSINES, found).flatten(4).flatten(2, 3) + 128
    planes = planes.round().clamp(0, 255)
    if x.shape[1] == 3:
        planes[:, 1:] -= 128
        planes = torch.einsum("ck,bkhw->bchw", torch.linalg.inv(YCC), planes)
    return planes[..., :height, :width] / 255


def pixelate(x: Tensor, severity: int, noise: Noise) -> Tensor:
    """Fewer pixels: each becomes the mean of those whose centres lie in its cell of a coarser grid, which begins anywhere.

    An image of up to 32 pixels a side has these shares of them as cells; on a larger one, what a cell has beyond one pixel
    grows with the image.
    """
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity]
    cell = 1 + (1 / share - 1) * max(1.0, _unit(x))
    start = cell * _drawn(torch.rand, noise, (2, 1))
    rows, columns = (_means(side, start[:, axis], cell) for axis, side in enumerate(x.shape[2:]))
    return rows @ x @ columns.mT


KINDS: dict[str, Callable[[Tensor, int, Noise], Tensor]] = {
    function.__name__: function for function in (gaussian_noise, impulse_noise, motion_blur, spatter, contrast, jpeg, pixelate)
}

# ── what they are made of ─────────────────────────────────────────────────────────────────────────────────────────────

LUMA = (0.299, 0.587, 0.114)
#: RGB → Y, Cb, Cr, without the 128 that is added to the last two
YCC = torch.tensor([LUMA, (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411)])
LUMINANCE = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMINANCE = torch.full((8, 8), 99)
CHROMINANCE[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
#: the orthonormal DCT-II, [frequency, place]
COSINES = torch.cos(torch.arange(8.0)[:, None] * (torch.arange(8.0) + 0.5) * math.pi / 8) / 2
COSINES[0] /= math.sqrt(2)


def _drawn(draw: Callable[..., Tensor], noise: Noise, shape: Sequence[int]) -> Tensor:
    """``[B, *shape]``, each image's from its own generator."""
    return torch.stack([draw(tuple(shape), generator=own) for own in noise])


def _unit(x: Tensor) -> float:
    """What a pixel of an image of 32 a side is here."""
    return min(x.shape[2:]) / 32


def _blurred(field_BHW: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur that wraps around, so that the field is as rough at its edges as within."""
    rows, columns = (torch.fft.fftfreq(side) for side in field_BHW.shape[1:])
    damping = torch.exp(-2 * (math.pi * sigma) ** 2 * (rows[:, None] ** 2 + columns**2))
    return torch.fft.ifft2(torch.fft.fft2(field_BHW) * damping).real


def _means(side: int, start_B1: Tensor, cell: float) -> Tensor:
    """``[B, 1, side, side]``: each place becomes the mean of those in its cell; the first begins ``start`` before it."""
    number = ((torch.arange(side) + 0.5 + start_B1) / cell).long()
    same = (number[:, :, None] == number[:, None]).float()
    return (same / same.sum(2, keepdim=True))[:, None]
