"""Models of matrices for the oracles of spectral methods: float64, and of low rank."""

from __future__ import annotations

import torch

SHAPES = {
    "wide": (9, 20),
    "tall": (20, 9),
    "square": (12, 12),
    "vector": (7,),
    "embed.weight": (11, 6),
    "conv": (3, 2, 2),
    "column": (5, 1),
}


def model(k, seed=0):
    """θ₀ and k experts in float64; task vectors share a part, as those of one base do, and have spectra that fall."""
    random = torch.Generator().manual_seed(seed)

    def draw(shape):
        x = torch.randn(shape, generator=random, dtype=torch.float64)
        return x * torch.linspace(1, 0.1, shape[-1]) if len(shape) == 2 else x

    base = {name: draw(shape) for name, shape in SHAPES.items()}
    shared = {name: draw(shape) for name, shape in SHAPES.items()}
    experts = [{name: base[name] + 0.05 * shared[name] + 0.1 * draw(shape) for name, shape in SHAPES.items()} for _ in range(k)]
    return base, experts


def task_vectors(base, experts, name):
    return [expert[name].double() - base[name].double() for expert in experts]


def lora(k, m=40, n=30, rank=2):
    """float32 experts whose task vectors have a low rank, and orthonormal bases of the spans of their columns and rows."""
    random = torch.Generator().manual_seed(0)
    factors = [(torch.randn(m, rank, generator=random) / 8, torch.randn(rank, n, generator=random) / 8) for _ in range(k)]
    base = {"w": torch.zeros(m, n)}
    columns = torch.linalg.qr(torch.cat([b for b, _ in factors], dim=1).double()).Q
    rows = torch.linalg.qr(torch.cat([a.T for _, a in factors], dim=1).double()).Q
    return base, [{"w": (b.double() @ a.double()).float()} for b, a in factors], columns, rows


def close(found, wanted, tolerance):
    """Equal up to ``tolerance`` of the largest entry."""
    size = float(wanted.abs().max()) or 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * size)
