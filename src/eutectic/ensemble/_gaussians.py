"""Mixtures of Gaussians: with full covariances, or as a kernel density on a reduced set of points.

M = components, d = coordinates, n = samples.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.checkpoint.spec import Layout
from eutectic.ensemble._density import Density, require_samples
from eutectic.ensemble._networks import Described
from eutectic.methods._method import Count, NonNegative, Positive

#: no component stands for fewer samples: its mean would be a sample, and a party shows none
LEAST = 5


class GaussianMixture(Density):
    """log p(z) = log Σ_m w_m N(z; μ_m, (W_mᵀW_m)⁻¹), W_m lower triangular."""

    def __init__(self, components: int, dims: int) -> None:
        """Standard normals."""
        super().__init__()
        self.log_weights = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.zeros(components, dims))
        self.whiteners = nn.Parameter(torch.eye(dims).repeat(components, 1, 1))

    def log_prob(self, z_Bd: Tensor) -> Tensor:
        """See Density."""
        constant = -0.5 * self.means.shape[1] * math.log(2 * math.pi)
        parts = []
        for mean, whitener in zip(self.means, self.whiteners, strict=True):
            white = (z_Bd - mean) @ whitener.tril().T
            parts.append(constant + whitener.diagonal().abs().log().sum() - 0.5 * (white * white).sum(1))
        return (self.log_weights.log_softmax(0)[:, None] + torch.stack(parts)).logsumexp(0)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """See Density."""
        chosen = torch.multinomial(self.log_weights.softmax(0), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        turned = torch.linalg.solve_triangular(self.whiteners.tril(), torch.eye(noise.shape[1]), upper=False)
        return self.means[chosen] + torch.einsum("nij,nj->ni", turned[chosen], noise)


class Kernel(Density):
    """log p(z) = log Σ_m w_m N(z; c_m, σ²I): one bandwidth, and a reduced set of centres, none of which is a sample."""

    def __init__(self, components: int, dims: int) -> None:
        """Standard normals."""
        super().__init__()
        self.log_weights = nn.Parameter(torch.zeros(components))
        self.centres = nn.Parameter(torch.zeros(components, dims))
        self.log_bandwidth = nn.Parameter(torch.zeros(()))

    def log_prob(self, z_Bd: Tensor) -> Tensor:
        """See Density."""
        square = torch.cdist(z_Bd, self.centres) ** 2 * torch.exp(-2 * self.log_bandwidth)
        constant = z_Bd.shape[1] * (self.log_bandwidth + 0.5 * math.log(2 * math.pi))
        return (self.log_weights.log_softmax(0) - 0.5 * square).logsumexp(1) - constant

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """See Density."""
        chosen = torch.multinomial(self.log_weights.softmax(0), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.centres.shape[1], generator=generator)
        return self.centres[chosen] + self.log_bandwidth.exp() * noise


class Gaussians(Described):
    """A mixture with so many components a class, full covariances, fitted by expectation maximisation.

    ``floor`` is a standard deviation below which no direction's goes; ``shrink`` so many samples' worth of the class's
    within-component covariance is in each component's.
    """

    kind: Literal["gaussians"] = "gaussians"
    components: Count = 8
    floor: Positive = 0.05
    shrink: NonNegative = 50.0
    steps: Count = 10

    def fit(self, z: Tensor, labels: Tensor, seed: int = 0) -> Density:
        """The density of ``z [n, d]``; each class has components of its own, weighed by its size.  Raises TaskError."""
        require_samples(z, labels)
        generator = torch.Generator().manual_seed(seed)
        parts = [self._of_class(z[labels == label], generator) for label in range(int(labels.max()) + 1)]
        weights, means, whiteners = (torch.cat(part) for part in zip(*parts, strict=True))
        found = GaussianMixture(*means.shape)
        found.load_state_dict({"log_weights": (weights / len(z)).log(), "means": means, "whiteners": whiteners})
        return found

    def _of_class(self, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        shares = F.one_hot(clusters(z, self.components, generator)).to(z)  # [n, M]
        found = self._maximised(z, shares)
        for _ in range(self.steps - 1):
            found = self._maximised(z, _expected(z, *found))
        return found

    def _maximised(self, z: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masses ``[M]``, means and whiteners of components that have these shares ``[n, M]`` of the samples."""
        mass = shares.sum(0).clamp(min=1e-6)
        means = (shares.T @ z) / mass[:, None]
        away = [z - mean for mean in means]
        scatters = torch.stack([(x * share[:, None]).T @ x for x, share in zip(away, shares.T, strict=True)])
        within, identity = scatters.sum(0) / len(z), torch.eye(z.shape[1], dtype=z.dtype)
        covariances = (scatters + self.shrink * within) / (mass + self.shrink).view(-1, 1, 1) + self.floor**2 * identity
        return mass, means, torch.linalg.solve_triangular(torch.linalg.cholesky(covariances), identity, upper=False)

    def empty(self, specs: Layout, dims: int) -> Density:
        """A density for these tensors, to be filled."""
        return GaussianMixture(_components(specs), dims)


def _expected(z: Tensor, mass: Tensor, means: Tensor, whiteners: Tensor) -> Tensor:
    """The components' shares of the samples, ``[n, M]``."""
    parts = [
        m.log() + whitener.diagonal().log().sum() - 0.5 * ((z - mean) @ whitener.T).square().sum(1)
        for m, mean, whitener in zip(mass, means, whiteners, strict=True)
    ]
    return torch.stack(parts, 1).softmax(1)


class Kernels(Described):
    """A kernel density on so many centres a class, the means of clusters; the bandwidth is fitted to samples held out."""

    kind: Literal["kernel"] = "kernel"
    centres: Count = 100

    def fit(self, z: Tensor, labels: Tensor, seed: int = 0) -> Density:
        """The density of ``z [n, d]``.  Raises TaskError."""
        require_samples(z, labels)
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(z), dtype=torch.bool)
        held[torch.randperm(len(z), generator=generator)[: max(1, len(z) // 10)]] = True
        centres, weights = [], []
        for label in range(int(labels.max()) + 1):
            own = z[(labels == label) & ~held] if ((labels == label) & ~held).any() else z[labels == label]
            shares = F.one_hot(clusters(own, self.centres, generator)).to(z)
            centres.append((shares.T @ own) / shares.sum(0)[:, None])
            weights.append(shares.mean(0) * int((labels == label).sum()))
        found = Kernel(*torch.cat(centres).shape)
        with torch.no_grad():
            found.centres.copy_(torch.cat(centres))
            found.log_weights.copy_(torch.cat(weights).log())
            square = torch.cdist(z[held], found.centres).square()  # [n, M]
            variance = square.min(1).values.mean() / z.shape[1]
            for _ in range(10):  # expectation maximisation of σ² alone
                shares = (found.log_weights.log_softmax(0) - 0.5 * square / variance).softmax(1)
                variance = (shares * square).sum() / (len(square) * z.shape[1])
            found.log_bandwidth.copy_(0.5 * variance.clamp(min=1e-12).log())
        return found

    def empty(self, specs: Layout, dims: int) -> Density:
        """A density for these tensors, to be filled."""
        return Kernel(_components(specs), dims)


def _components(specs: Layout) -> int:
    return next(iter(specs["log_weights"].shape), 0) if "log_weights" in specs else 0


def clusters(z: Tensor, k: int, generator: torch.Generator, steps: int = 10) -> Tensor:
    """Which of at most ``k`` clusters each sample is in, ``[n]``, by k-means (Lloyd, 1982).

    Clusters of fewer than ``LEAST`` samples are dissolved, so a small set has fewer of them, but at least one.
    """
    centres = z[torch.randperm(len(z), generator=generator)[: max(1, min(k, len(z) // LEAST))]]
    for _ in range(steps):
        nearest = torch.cdist(z, centres).argmin(1)
        sizes = nearest.bincount(minlength=len(centres))
        centres = torch.zeros_like(centres).index_add(0, nearest, z)[sizes > 0] / sizes[sizes > 0, None]
    while True:
        nearest = torch.cdist(z, centres).argmin(1)
        sizes = nearest.bincount(minlength=len(centres))
        if len(centres) == 1 or sizes.min() >= LEAST:
            return nearest
        centres = centres[torch.arange(len(centres)) != sizes.argmin()]
