"""Corruptions: what each does, and what all of them keep."""

import itertools
import math

import pytest
import torch

from eutectic.bench import corruptions, zoo
from eutectic.bench.corruptions import KINDS, SEVERITIES, corrupt, corrupted
from eutectic.errors import ParameterError, TaskError, UnknownNameError
from eutectic.task import Task

RANDOM = ("gaussian_noise", "impulse_noise", "motion_blur", "spatter", "pixelate")


def mosaics(images, side):
    """RGB images of a side, each channel made of other grey images."""
    n = side // images.shape[1]
    images = images[: len(images) // (3 * n * n) * 3 * n * n, :, :, 0]
    return images.view(-1, 3, n, n, *images.shape[1:]).permute(0, 2, 4, 3, 5, 1).reshape(-1, side, side, 3)


@pytest.fixture(scope="module")
def suite():
    return zoo.open_suite("mini")


@pytest.fixture(scope="module")
def images(suite):
    def some(task, n=100):
        return suite.arrays(task, "test").inputs[:n]

    fashion = some("fashion", 400)
    return {
        "7 RGB": some("indian_pines", 200),
        "8 grey": some("digits8", 200),
        "28 grey": fashion[:100],
        "42 RGB": some("openclipart", 64),
        "56 RGB": mosaics(fashion, 56),
        "224 RGB": mosaics(fashion, 224),
    }


def change(images, kind, severity, seed=0):
    return (corrupt(images, kind, severity, seed).int() - images.int()).abs().float().mean().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["7 RGB", "8 grey", "28 grey", "42 RGB", "56 RGB", "224 RGB"])
def test_shape_and_dtype_are_kept_and_a_higher_severity_changes_more(images, kind, size):
    given = images[size].clone()
    changes = []
    for severity in SEVERITIES:
        worse = corrupt(given, kind, severity)
        assert worse.shape == given.shape
        assert worse.dtype == torch.uint8
        changes.append((worse.int() - given.int()).abs().float().mean().item())
    assert torch.equal(given, images[size])
    assert changes[0] > 0.2
    # a white ground can by luck come off better at a lower quality of JPEG
    slack = 1.1 if (kind, size) == ("jpeg", "42 RGB") else 1.0
    assert all(low < slack * high for low, high in itertools.pairwise(changes)), changes


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_image_depends_on_its_place_and_the_seed_alone(images, kind, monkeypatch):
    given = images["28 grey"]
    worse = corrupt(given, kind, 3, seed=1)
    assert torch.equal(worse, corrupt(given, kind, 3, seed=1))
    assert torch.equal(worse[:5], corrupt(given[:5], kind, 3, seed=1))
    assert torch.equal(worse, corrupt(given, kind, 3, seed=2)) == (kind not in RANDOM)
    twins = corrupt(given[:1].expand(2, -1, -1, -1), kind, 3)
    assert torch.equal(twins[0], twins[1]) == (kind not in RANDOM)
    monkeypatch.setattr(corruptions, "TOGETHER", 7)
    assert torch.equal(worse, corrupt(given, kind, 3, seed=1))


@pytest.mark.parametrize("kind", ["motion_blur", "contrast", "jpeg", "pixelate"])
def test_a_grey_wall_stays_one(kind):
    wall = torch.full((2, 30, 20, 3), 128, dtype=torch.uint8)
    assert torch.equal(corrupt(wall, kind, 5), wall)


def test_a_trail_grows_with_the_image(images):
    small = images["42 RGB"][:6]
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for severity in (1, 5):
        assert change(large, "motion_blur", severity) == pytest.approx(change(small, "motion_blur", severity), rel=0.1)


def test_drops_grow_with_the_image():
    def edges(side):
        wet = corrupt(torch.zeros(4, side, side, 1, dtype=torch.uint8), "spatter", 5) > 0
        return (wet[:, :, 1:] != wet[:, :, :-1]).double().sum(2).mean().item()

    assert edges(224) == pytest.approx(edges(64), rel=0.25)


@pytest.mark.parametrize(("severity", "sigma", "share"), [(1, 0.04, 0.01), (5, 0.10, 0.07)])
def test_noise_has_its_size(severity, sigma, share):
    grey = torch.full((20, 32, 32, 3), 128, dtype=torch.uint8)
    noise = corrupt(grey, "gaussian_noise", severity).float() - 128
    assert noise.std().item() == pytest.approx(255 * sigma, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.5)
    worse = corrupt(grey, "impulse_noise", severity)
    for extreme in (0, 255):
        assert (worse == extreme).double().mean().item() == pytest.approx(share / 2, rel=0.15)
    assert ((worse == 0) | (worse == 128) | (worse == 255)).all()


def test_impulses_of_a_lower_severity_stay_at_a_higher_one(images):
    given = images["42 RGB"]
    low, high = (corrupt(given, "impulse_noise", severity) for severity in (2, 4))
    hit = low != given
    assert torch.equal(low[hit], high[hit])


def test_motion_blur_is_a_trail_along_one_line():
    dot = torch.zeros(40, 32, 32, 1, dtype=torch.uint8)
    dot[:, 16, 16] = 255
    angles = []
    for trail in corrupt(dot, "motion_blur", 5).float().squeeze(-1):
        y, x = (trail > 0).nonzero().float().T - 16
        weight = trail[trail > 0]
        moments = torch.stack([(weight * x * x).sum(), (weight * x * y).sum(), (weight * y * y).sum()]) / weight.sum()
        along, across = torch.linalg.eigvalsh(torch.stack([moments[:2], moments[1:]])).flip(0).tolist()
        assert math.sqrt(along) == pytest.approx(2.5, rel=0.1)
        assert math.sqrt(across) < 0.6
        angles.append(math.degrees(math.atan2((weight * y).sum(), (weight * x).sum())) % 180)
    angles = [angle - 180 if angle > 90 else angle for angle in angles]
    assert -46 < min(angles) < -25
    assert 25 < max(angles) < 46


def test_spatter_covers_a_share_with_water(images):
    black = torch.zeros(10, 32, 32, 3, dtype=torch.uint8)
    worse = corrupt(black, "spatter", 5)
    assert (worse > 0).any(-1).double().mean().item() == pytest.approx(0.32, abs=0.01)
    assert worse.flatten(0, 2).amax(0).tolist() == [140, 190, 190]  # 0.8 of pale turquoise
    grey = corrupt(black[..., :1], "spatter", 5)
    assert grey.max().item() == round(0.8 * (0.299 * 175 + 0.701 * 238))


def test_contrast_is_the_papers_formula(images):
    given = images["42 RGB"]
    mean = given.double().mean((1, 2), keepdim=True)
    expected = (mean + 0.15 * (given.double() - mean)).round()
    assert (corrupt(given, "contrast", 5).double() - expected).abs().max() <= 1


def test_jpeg_is_annex_ks_quantisation(images):
    """The top left block of a grey image at quality 40 (scale 125 %), from the standard's formulae in float64."""
    given = images["28 grey"][:3]
    worse = corrupt(given, "jpeg", 5).double()
    for before, after in zip(given[:, :8, :8, 0].double() - 128, worse[:, :8, :8, 0] - 128, strict=True):
        found = torch.zeros(8, 8, dtype=torch.float64)
        for u in range(8):
            for v in range(8):
                wave = wave_of(u, v)
                step = (int(corruptions.LUMINANCE[u, v]) * 125 + 50) // 100
                found += wave * ((before * wave).sum() / step).round() * step
        assert (found.clamp(-128, 127) - after).abs().max() <= 1


def wave_of(u, v):
    places = torch.arange(8, dtype=torch.float64)
    rows, columns = (((2 * places + 1) * k * math.pi / 16).cos() * (math.sqrt(0.125) if k == 0 else 0.5) for k in (u, v))
    return rows[:, None] * columns


def test_jpeg_keeps_colours(images):
    given = images["42 RGB"].float()
    worse = corrupt(images["42 RGB"], "jpeg", 1).float()
    assert (worse.mean((1, 2)) - given.mean((1, 2))).abs().max() < 4


def test_pixelate_makes_a_coarser_grid_once(images):
    given = images["28 grey"]
    worse = corrupt(given, "pixelate", 5)
    assert torch.equal(corrupt(worse, "pixelate", 5), worse)
    waves = torch.rand(50, 32, 32, 1, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    rows = [len(image.unique(dim=0)) for image in corrupt(waves, "pixelate", 5).squeeze(-1)]
    assert sum(rows) / len(rows) == pytest.approx(0.65 * 32, abs=1)


def test_what_cannot_be_corrupted_is_refused(images):
    with pytest.raises(UnknownNameError, match="Did you mean 'pixelate'"):
        corrupt(images["8 grey"], "pixelat", 1)
    with pytest.raises(ParameterError, match=r"severity = 6 .*1, 2, 3, 4, 5"):
        corrupt(images["8 grey"], "jpeg", 6)
    for wrong in (images["8 grey"].float(), images["8 grey"].expand(-1, -1, -1, 4), torch.zeros(3, 7, dtype=torch.uint8)):
        with pytest.raises(TaskError, match="are no images"):
            corrupt(wrong, "jpeg", 1)
    words = torch.zeros(4, 64, dtype=torch.int64)
    with pytest.raises(TaskError, match=r"'bbc', split 'test'.*int64 are no images"):
        corrupted(Task("bbc", torch.nn.Identity(), test=(words, words[:, 0])), "jpeg", 1)


def test_a_corrupted_task_has_its_head_labels_and_other_splits(suite):
    task = suite.task("digits8")
    worse = corrupted(task, "gaussian_noise", 2)
    assert worse.name == task.name
    assert worse.head is task.head
    assert list(worse.splits) == list(task.splits)
    assert all(worse.arrays(split) is task.arrays(split) for split in ("train", "val", "adapt"))
    assert torch.equal(worse.arrays("test").labels, task.arrays("test").labels)
    assert not torch.equal(worse.arrays("test").inputs, task.arrays("test").inputs)
    shown, _ = worse.arrays("test").take(torch.arange(2))
    assert shown.shape == (2, 3, 42, 42)
    both = corrupted(task, "gaussian_noise", 2, splits=("adapt", "test"))
    assert torch.equal(both.arrays("test").inputs, worse.arrays("test").inputs)
    # other draws for another split and task
    wall = torch.full((5, 8, 8, 1), 128, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    walls = [
        corrupted(Task(name, task.head, adapt=wall, test=wall), "gaussian_noise", 2, 0, ("adapt", "test")) for name in "ab"
    ]
    drawn = {worse.arrays(split).inputs.numpy().tobytes() for worse in walls for split in ("adapt", "test")}
    assert len(drawn) == 4
