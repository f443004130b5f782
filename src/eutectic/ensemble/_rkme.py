"""Model reuse by reduced kernel mean embeddings: a few weighted points say what a party has, and one party answers an input.

M = points of a party, K = parties, d = coordinates of the space, B = inputs to be answered, which are seen together.

Source: Wu, Xu, Liu and Zhou, "Model reuse with reduced kernel mean embedding specification", IEEE TKDE 2023,
arXiv:2001.07135. Differs from the paper in that the points are cluster means, not moved further by gradient steps; that
mimicked samples are herded from the inputs to be answered; and that the selector is a kernel ridge, not a support vector
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eutectic.ensemble._gaussians import clusters

#: of the kernel exp(−γ ‖a − b‖)
GAMMA = 0.2


class Embedding(NamedTuple):
    """Points ``[M, d]`` and their weights ``[M]``: μ(x) = Σ_m β_m k(z_m, x)."""

    points: Tensor
    weights: Tensor

    def at(self, z: Tensor) -> Tensor:
        """μ at each row, ``[n]``."""
        return kernel(z, self.points) @ self.weights


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """``[n, m]``."""
    return torch.exp(-GAMMA * torch.cdist(a, b))


def embed(z: Tensor, points: int = 10, seed: int = 0) -> Embedding:
    """What a party hands over for its samples ``z [n, d]``: β = K⁻¹ C, the embedding's projection onto that of the points."""
    shares = F.one_hot(clusters(z, points, torch.Generator().manual_seed(seed))).to(z)
    centres = (shares.T @ z) / shares.sum(0)[:, None]
    gram = kernel(centres, centres).double() + 1e-6 * torch.eye(len(centres))
    return Embedding(centres, torch.linalg.solve(gram, kernel(centres, z).double().mean(1)).float())


def shares_of(embeddings: Sequence[Embedding], z: Tensor) -> Tensor:
    """How much of the inputs ``z [B, d]`` is each party's: relu(H⁻¹ C), summing to 1, ``[K]``."""
    gram = torch.stack([torch.stack([a.weights @ b.at(a.points) for b in embeddings]) for a in embeddings])
    towards = torch.stack([one.at(z).mean() for one in embeddings])
    found = torch.linalg.solve(gram.double() + 1e-8 * torch.eye(len(gram)), towards.double()).clamp(min=0).float()
    return found / found.sum() if found.sum() > 0 else torch.full_like(found, 1 / len(found))


def herd(embedding: Embedding, z: Tensor, n: int) -> Tensor:
    """Rows of ``z`` whose mean embedding comes near a party's, chosen greedily (Chen, Welling and Smola, 2010), ``[n]``."""
    towards, so_far, chosen = embedding.at(z), torch.zeros(len(z)), []
    for t in range(n):
        best = int((towards - so_far / (t + 1)).argmax())
        chosen.append(best)
        so_far = so_far + kernel(z, z[best : best + 1]).squeeze(1)
    return torch.tensor(chosen, dtype=torch.long)


def route(embeddings: Sequence[Embedding], z: Tensor, samples: int = 100) -> Tensor:
    """Which party answers each input, ``[B]``: a kernel ridge over herded inputs, each labelled by whom it was herded for."""
    rows, parties = [], []
    for party, share in enumerate(shares_of(embeddings, z).tolist()):
        chosen = herd(embeddings[party], z, max(1, round(share * samples)))
        rows.append(z[chosen])
        parties += [party] * len(chosen)
    seen, labels = torch.cat(rows), F.one_hot(torch.tensor(parties), len(embeddings)).to(z)
    gram = kernel(seen, seen) + 1e-2 * torch.eye(len(seen))
    return (kernel(z, seen) @ torch.linalg.solve(gram, labels)).argmax(1)
