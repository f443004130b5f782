"""Density models: normalised, exact where they can be, and without samples in them."""

import functools
import math

import pytest
import torch

from eutectic import errors
from eutectic.ensemble._density import Cosines, Flat
from eutectic.ensemble._flow import RealNVP
from eutectic.ensemble._gaussians import LEAST, GaussianMixture, Gaussians, Kernel, Kernels, clusters


def spirals(n=600, seed=0):
    """Two classes of points ``[n, 2]`` on bent lines."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    angle = 3 * torch.rand(n, generator=generator)
    radius = 1 + labels + 0.1 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels


MODELS = [Gaussians(components=4), Kernels(centres=20), RealNVP(transforms=4, hidden=(32,), epochs=12, lr=5e-3, batch_size=100)]
IDS = [model.kind for model in MODELS]


@functools.cache
def fitted(model):
    if model.kind == "realnvp":
        pytest.importorskip("zuko")
    return model.fit(*spirals())


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_it_integrates_to_one_and_likes_its_own_data(model):
    density = fitted(model)
    axis = torch.linspace(-6, 6, 201)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_p = density.log_prob(grid)
        torch.testing.assert_close(log_p.exp().sum() * (axis[1] - axis[0]) ** 2, torch.tensor(1.0), atol=0.02, rtol=0)
        own, _ = spirals(seed=1)
        assert (
            density.log_prob(own).mean() > -math.log(2 * math.pi * own.var(0).prod().sqrt()) - 1
        )  # a single Gaussian's entropy
        assert density.log_prob(own).mean() > density.log_prob(own + 2).mean() + 1


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_draws_are_of_the_density(model):
    density = fitted(model)
    drawn = density.sample(2000, torch.Generator().manual_seed(0))
    own, _ = spirals(seed=1)
    torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(drawn.std(0), own.std(0), atol=0.15, rtol=0)
    assert torch.equal(drawn, density.sample(2000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_one_seed_gives_one_density(model):
    first, again = fitted(model), model.fit(*spirals())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_one_gaussian_is_the_normal_distribution_of_the_sample():
    z, _ = spirals()
    density = Gaussians(components=1, floor=1e-6, shrink=0).fit(z, torch.zeros(len(z), dtype=torch.long))
    covariance = torch.cov(z.T, correction=0).double() + 1e-12 * torch.eye(2)
    oracle = torch.distributions.MultivariateNormal(z.double().mean(0), covariance)
    torch.testing.assert_close(density.log_prob(z).double(), oracle.log_prob(z.double()), atol=1e-4, rtol=0)


def test_mixtures_agree_with_torch_in_float64():
    generator = torch.Generator().manual_seed(0)
    mixture, kernel = GaussianMixture(3, 4), Kernel(3, 4)
    with torch.no_grad():
        for density in (mixture, kernel):
            for parameter in density.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    z = torch.randn(20, 4, generator=generator)
    precisions = [w.tril().double().T @ w.tril().double() for w in mixture.whiteners.detach()]
    parts = [
        torch.distributions.MultivariateNormal(m.double(), precision_matrix=p).log_prob(z.double())
        for m, p in zip(mixture.means.detach(), precisions, strict=True)
    ]
    oracle = (mixture.log_weights.double().log_softmax(0)[:, None] + torch.stack(parts)).logsumexp(0)
    torch.testing.assert_close(mixture.log_prob(z).double(), oracle, atol=1e-4, rtol=1e-5)
    wide = kernel.log_bandwidth.double().exp()
    parts = [torch.distributions.Normal(c.double(), wide).log_prob(z.double()).sum(1) for c in kernel.centres]
    oracle = (kernel.log_weights.double().log_softmax(0)[:, None] + torch.stack(parts)).logsumexp(0)
    torch.testing.assert_close(kernel.log_prob(z).double(), oracle, atol=1e-4, rtol=1e-5)


def test_a_flow_is_inverted_and_its_volume_is_the_jacobians():
    pytest.importorskip("zuko")
    flow = RealNVP(transforms=4, hidden=(16,), epochs=2).fit(*spirals())
    turn = flow.flow().transform
    x = torch.randn(5, 2)
    torch.testing.assert_close(turn.inv(turn(x)), x, atol=1e-4, rtol=1e-4)
    for point in x:
        jacobian = torch.autograd.functional.jacobian(turn, point)
        _, log_volume = turn.call_and_ladj(point)
        torch.testing.assert_close(log_volume, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-4, rtol=1e-4)


def test_no_sample_is_in_what_is_handed_over():
    z, labels = spirals(200)
    for model in (Gaussians(components=60), Kernels(centres=60)):
        for tensor in model.fit(z, labels).state_dict().values():
            if tensor.ndim == 2 and tensor.shape[1] == 2:
                assert torch.cdist(z, tensor.detach()).min() > 1e-6
    sizes = clusters(z, 60, torch.Generator().manual_seed(0)).bincount()
    assert sizes.min() >= LEAST
    assert clusters(z[:3], 60, torch.Generator().manual_seed(0)).tolist() == [0, 0, 0]


def test_what_no_density_can_be_fitted_to_is_refused():
    z, labels = spirals(20)
    for inputs, classes, says in (
        (z[:0], labels[:0], "0 samples"),
        (z, labels * 2, r"none of classes \[1\]"),
        (z / 0, labels, "not finite"),
    ):
        for model in (Gaussians(), Kernels()):
            with pytest.raises(errors.TaskError, match=says):
                model.fit(inputs, classes)


def test_cosines_are_orthonormal_and_back_keeps_what_they_hold():
    images = torch.rand(4, 3, 8, 6)
    whole = Cosines(size=6)
    z = whole.into(images)
    assert z.shape == (4, whole.dims((3, 8, 6)))
    smooth = whole.back(z, (3, 8, 6))
    torch.testing.assert_close(whole.into(smooth), z, atol=1e-5, rtol=1e-5)
    square = torch.rand(2, 1, 6, 6)
    torch.testing.assert_close(whole.into(square).square().sum(), square.square().sum())
    torch.testing.assert_close(whole.back(whole.into(square), (1, 6, 6)), square)
    assert torch.equal(Flat().back(Flat().into(images), (3, 8, 6)), images)
    with pytest.raises(errors.CheckpointError, match="9 frequencies a side need images"):
        Cosines(size=9).dims((1, 8, 8))
