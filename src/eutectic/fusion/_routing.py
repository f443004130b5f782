"""Linear layers whose weights depend on their input, y = W₀x + b₀ + Σᵢ cᵢ(x) (Dᵢx + dᵢ), and how they get into a network.

N = experts, B = samples, T = tokens, m × n = the shape of the layer's matrix, r = the rank of Dᵢ.  Coefficients are those of
one token, or of one sample, so that an output never depends on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import LayoutError
from eutectic.fusion._products import per_sample


def coefficients(scores: Tensor, top: int) -> Tensor:
    """The softmax over the ``top`` highest of the scores ``[…, N]``, and 0 for all others; for one it is exactly 1."""
    best, which = scores.topk(top, dim=-1)
    return torch.zeros_like(scores).scatter(-1, which, best.softmax(-1))


class LowRankExperts(nn.Linear):
    """A linear layer with N experts Dᵢ = LᵢRᵢ, of which a token takes the ``top`` on whose directions it is longest.

    ``right`` is R ``[N, d, n]``, with orthonormal rows; the score of expert i is ‖Rᵢx‖ over the first ``gate`` of them.
    ``left`` is L ``[m, N, r]``; its r ≤ d directions are those of the first r rows, so that gate and experts share one
    product.  ``shift`` is d ``[N, m]``, if there is any.  A layer without directions has nothing to choose by, and takes the
    mean of the shifts.  W₀ and b₀ are the given layer's own parameters, under their names.
    """

    def __init__(self, linear: nn.Linear, right: Tensor, left: Tensor, shift: Tensor | None, gate: int, top: int) -> None:
        """Copy the factors in the layer's dtype; they need no gradient."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.gate = gate
        self.top = min(top, len(right)) if right.shape[1] else len(right)
        self.right, self.left = _frozen(right, linear), _frozen(left, linear)
        self.shift = None if shift is None else _frozen(shift, linear)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[…, n]`` → ``[…, m]``."""
        z = F.linear(input, self.right.flatten(0, 1)).unflatten(-1, self.right.shape[:2])
        c = coefficients(torch.linalg.vector_norm(z[..., : self.gate], dim=-1), self.top)
        y = super().forward(input)
        y = y + F.linear((z[..., : self.left.shape[2]] * c[..., None]).flatten(-2), self.left.flatten(1))
        return y if self.shift is None else y + c @ self.shift

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{super().extra_repr()}, experts={len(self.right)}, rank={self.left.shape[2]}, top={self.top}"


class Shared:
    """The coefficients ``[B, N]`` that the layers of a block share, from the first to the last; copies start without."""

    c: Tensor | None = None

    def __getstate__(self) -> None:
        """They are of one forward pass."""


class DenseExperts(nn.Linear):
    """A linear layer with N experts of whole matrices, merged for each sample by the coefficients of its block.

    ``deltas`` is D ``[N, m, n]``, ``shift`` is d ``[N, m]``, for layers with a bias.  W₀ and b₀ are the given layer's own.
    """

    def __init__(self, linear: nn.Linear, deltas: Tensor, shift: Tensor | None, shared: Shared) -> None:
        """Copy the experts in the layer's dtype; they need no gradient."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.shared = linear.weight, linear.bias, shared
        self.deltas = _frozen(deltas, linear)
        self.shift = None if shift is None else _frozen(shift, linear)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[B, …, n]`` → ``[B, …, m]``.  Raises LayoutError if the first layer of its block was not there before it."""
        c = self.shared.c
        if c is None or len(c) != len(input):
            raise LayoutError("a layer of a routed block got other samples than its first, by whose input they are routed")
        x = input.reshape(len(input), -1, input.shape[-1])
        y = per_sample(x, c.to(self.weight.dtype), self.weight, self.deltas)
        if self.shift is not None:
            y = y + (self.bias + c.to(self.weight.dtype) @ self.shift)[:, None]
        return y.view(*input.shape[:-1], self.out_features)


class LeadingExperts(DenseExperts):
    """The first layer of a block, whose input is what the block is routed by: c = the router's mean over a sample's tokens."""

    def __init__(self, linear: nn.Linear, deltas: Tensor, shift: Tensor | None, shared: Shared, router: nn.Module) -> None:
        """``router`` makes ``[…, N]`` of ``[…, n]``."""
        super().__init__(linear, deltas, shift, shared)
        self.router = router

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        found = self.router(input)
        self.shared.c = found.reshape(len(input), -1, found.shape[-1]).mean(1)
        return super().forward(input)


def _frozen(tensor: Tensor, like: nn.Linear) -> nn.Parameter:
    return nn.Parameter(tensor.to(like.weight, copy=True), requires_grad=False)


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network by path, those that are used twice under their first.

    Raises LayoutError for PyTorch's own attention and transformer layers, which read their layers' weights past ``forward``.
    """
    found = {}
    for path, module in network.named_modules():
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise LayoutError(f"{path or 'the network'} is a torch.nn.{type(module).__name__}, whose layers cannot be routed")
        if type(module) is nn.Linear:
            found[path] = module
    return found


def replaced(network: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """The network with other modules at these paths, in place, wherever else it uses the old ones too."""
    new = {network.get_submodule(path): layer for path, layer in layers.items()}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if path and module in new:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, new[module])
    return new.get(network, network)
