"""Normalising flows, by zuko."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from eutectic.checkpoint.spec import Layout
from eutectic.ensemble._density import Density, require_samples
from eutectic.ensemble._networks import Described
from eutectic.errors import MissingDependencyError, NonFiniteError
from eutectic.methods._method import Count, NonNegative, Positive


class Flow(Density):
    """RealNVP: affine couplings onto a standard normal, of coordinates that are first centred and scaled.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017, arXiv:1605.08803.
    """

    def __init__(self, dims: int, transforms: int, hidden: tuple[int, ...]) -> None:
        """Untrained."""
        super().__init__()
        self.centre = nn.Buffer(torch.zeros(dims))
        self.log_scale = nn.Buffer(torch.zeros(dims))
        self.flow = _zuko().flows.RealNVP(dims, transforms=transforms, hidden_features=hidden)

    def log_prob(self, z_Bd: Tensor) -> Tensor:
        """See Density."""
        return self.flow().log_prob((z_Bd - self.centre) * torch.exp(-self.log_scale)) - self.log_scale.sum()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """See Density."""
        drawn = self.flow().transform.inv(torch.randn(n, len(self.centre), generator=generator))
        return self.centre + self.log_scale.exp() * drawn


class RealNVP(Described):
    """A RealNVP of so many couplings, fitted by maximum likelihood with Adam on samples with ``noise`` added.

    The noise is a standard deviation: without it, coordinates that hardly vary, such as an image's corners, would have a
    density as large as training is long.
    """

    kind: Literal["realnvp"] = "realnvp"
    transforms: Count = 6
    hidden: tuple[Count, ...] = (128, 128)
    epochs: Count = 10
    lr: Positive = 1e-3
    batch_size: Count = 128
    noise: NonNegative = 0.05

    def fit(self, z: Tensor, labels: Tensor, seed: int = 0) -> Density:
        """The density of ``z [n, d]``; labels are not used.  Raises TaskError, NonFiniteError, MissingDependencyError."""
        require_samples(z, labels)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = Flow(z.shape[1], self.transforms, self.hidden)
        with torch.no_grad():
            found.centre.copy_(z.mean(0))
            found.log_scale.copy_(0.5 * (z.var(0) + self.noise**2).clamp(min=1e-12).log())
        optimiser = torch.optim.Adam(found.parameters(), lr=self.lr)
        steps = self.epochs * -(-len(z) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(self.epochs):
            for index in torch.randperm(len(z), generator=generator).split(self.batch_size):
                batch = z[index] + self.noise * torch.randn(len(index), z.shape[1], generator=generator)
                loss = -found.log_prob(batch).mean()
                if not torch.isfinite(loss):
                    raise NonFiniteError(
                        f"a RealNVP's loss is {loss.item()}: lower its lr ({self.lr}), or add noise ({self.noise})"
                    )
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(found.parameters(), 10.0)
                optimiser.step()
                schedule.step()
        return found.eval()

    def empty(self, specs: Layout, dims: int) -> Density:
        """A density for these tensors, to be filled."""
        return Flow(dims, self.transforms, self.hidden)


def _zuko() -> Any:
    try:
        import zuko
    except ImportError:
        raise MissingDependencyError("flows need zuko: pip install 'eutectic[flows]'") from None
    return zuko
