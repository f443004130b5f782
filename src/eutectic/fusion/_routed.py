"""Linear layers whose weights depend on their input, y = W₀x + b₀ + Σᵢ cᵢ(x) (Dᵢx + dᵢ).

N = experts, B = samples, T = tokens, m × n = the shape of the layer's matrix, r = the rank of Dᵢ.  Coefficients are those of
one token, or of one sample, so that an output never depends on what else is in its batch.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import LayoutError
from eutectic.fusion._products import per_sample, sparse_per_sample, tiles

Description = Mapping[str, Any]
#: tokens for each expert that make it worth while to bring together those of one expert
MANY = 32


def coefficients(scores: Tensor, top: int) -> Tensor:
    """The softmax over the ``top`` highest of the scores ``[…, N]``, and 0 for all others; for one it is exactly 1."""
    best, which = scores.topk(top, dim=-1)
    return torch.zeros_like(scores).scatter(-1, which, best.softmax(-1))


class StandIn(nn.Linear):
    """A linear layer that stands for a module of another kind, and has that one's own parameters."""

    def __init__(self, module: nn.Module, inputs: int, outputs: int) -> None:
        """Of this module."""
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight = module.get_parameter("weight")
        self.register_parameter("bias", dict(module.named_parameters(recurse=False)).get("bias"))
        self.train(module.training)
        self._stands_for = [module]  # in a list, as it is no part of this one

    @property
    def module(self) -> nn.Module:
        """The one that it stands for."""
        return self._stands_for[0]


class Turned(StandIn):
    """For a ``Conv1D`` of transformers, such as GPT-2's, whose weight is Wᵀ ``[n, m]``."""

    def __init__(self, module: nn.Module) -> None:
        """Of this module."""
        super().__init__(module, *module.get_parameter("weight").shape)


class Patches(StandIn):
    """For a convolution whose windows lie side by side, such as what makes an image's patches tokens: W ``[m, C, h, w]``."""

    def __init__(self, module: nn.Conv2d) -> None:
        """Of this module."""
        super().__init__(module, module.weight[0].numel(), module.out_channels)

    @staticmethod
    def are(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether a module is such a convolution."""
        return type(module) is nn.Conv2d and (
            module.kernel_size == module.stride
            and (module.padding, module.dilation, module.groups) == ((0, 0), (1, 1), 1)  # not "valid", which nobody writes
        )


def module_of(linear: nn.Linear) -> nn.Module:
    """The network's own module of one of its ``linears``."""
    return linear.module if isinstance(linear, StandIn) else linear


class Routed(nn.Linear):
    """A linear layer with experts, made over a plain one, whose own parameters W₀ and b₀ it has under their names."""

    #: what ``routed`` made it of
    about: Description = MappingProxyType({})

    def __init__(self, linear: nn.Linear) -> None:
        """Over this layer."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.turned = isinstance(linear, Turned)
        self.window = tuple(linear.weight.shape[2:]) if isinstance(linear, Patches) else ()
        self.train(linear.training)

    @property
    def matrix(self) -> Tensor:
        """W₀ ``[m, n]``."""
        return self.weight.T if self.turned else self.weight.flatten(1)

    def tokens(self, input: Tensor) -> Tensor:
        """What the matrix is applied to: ``[…, n]`` as it is, the windows ``[B, H/h, W/w, n]`` of images ``[B, C, H, W]``."""
        if not self.window:
            return input
        h, w = self.window
        return input.unfold(2, h, h).unfold(3, w, w).permute(0, 2, 3, 1, 4, 5).flatten(3)

    def output(self, y: Tensor) -> Tensor:
        """Of the tokens' ``[…, m]``, what the layer stands for would give."""
        return y.movedim(-1, 1) if self.window else y

    def base(self, input: Tensor) -> Tensor:
        """W₀x + b₀."""
        return self.output(F.linear(self.tokens(input), self.matrix, self.bias))

    def expected(self, *shape: int) -> nn.Parameter:
        """A tensor of the experts that is still to come, on the device ``meta``; it needs no gradient.  Raises LayoutError."""
        if min(shape) < 0:
            raise LayoutError(f"a routed layer cannot have experts of {list(shape)}")
        return nn.Parameter(torch.empty(shape, dtype=self.weight.dtype, device="meta"), requires_grad=False)


def along(input: Tensor, right: Tensor) -> Tensor:
    """Rᵢx ``[…, N, d]`` of tokens ``[…, n]`` and R ``[N, d, n]``."""
    return F.linear(input, right.flatten(0, 1)).unflatten(-1, right.shape[:2])


def back(z: Tensor, left: Tensor) -> Tensor:
    """Σᵢ Lᵢzᵢ ``[…, m]`` of ``[…, N, r]`` and L ``[m, N, r]``."""
    return F.linear(z.flatten(-2), left.flatten(1))


class LowRankExperts(Routed):
    """A linear layer with N experts Dᵢ = LᵢRᵢ, of which a token takes the ``top`` on whose directions it is longest.

    ``right`` is R ``[N, d, n]``, with orthonormal rows; the score of expert i is ‖Rᵢx‖ over the first ``gate`` of them.
    ``left`` is L ``[m, N, r]``; its r ≤ d directions are those of the first r rows, so that gate and experts share one
    product.  ``shift`` is d ``[N, m]``, if the layer has a bias.  A layer without directions has nothing to choose by, and
    takes the mean of the shifts.
    """

    def __init__(self, linear: nn.Linear, experts: int, directions: int, rank: int, gate: int, top: int) -> None:
        """Of these sizes, on the device ``meta``."""
        super().__init__(linear)
        self.gate = gate
        self.top = min(top, experts) if directions else experts
        self.right = self.expected(experts, directions, self.in_features)
        self.left = self.expected(self.out_features, experts, rank)
        self.shift = None if self.bias is None else self.expected(experts, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """``[…, n]`` → ``[…, m]``."""
        tokens = self.tokens(input)
        known = tokens.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if self.top == 1 and known and tokens[..., 0].numel() >= MANY * len(self.right):  # sizes that follow from the input
            return self.output(self._expert_by_expert(tokens.reshape(-1, self.in_features)).view(*tokens.shape[:-1], -1))
        z = along(tokens, self.right)
        c = self._chosen(z)
        y = F.linear(tokens, self.matrix, self.bias) + back(z[..., : self.left.shape[2]] * c[..., None], self.left)
        return self.output(y if self.shift is None else y + c @ self.shift)

    def _expert_by_expert(self, x: Tensor) -> Tensor:
        """``[S, n]`` → ``[S, m]``, each token through the one expert that it chooses: they are brought together, and back."""
        which = self._scores(along(x, self.right[:, : self.gate])).topk(1, dim=-1).indices[:, 0]  # as ``coefficients`` does
        order = which.argsort()
        x = x.index_select(0, order)
        y, start = F.linear(x, self.matrix, self.bias), 0
        for i, count in enumerate(which.bincount(minlength=len(self.right)).tolist()):
            own = slice(start, start := start + count)
            z = F.linear(x[own], self.right[i, : self.left.shape[2]])
            y[own] += F.linear(z, self.left[:, i], None if self.shift is None else self.shift[i])
        return y.index_select(0, order.argsort())

    def choice(self, input: Tensor) -> Tensor:
        """The coefficients ``[…, N]`` that tokens ``[…, n]`` give the experts."""
        return self._chosen(along(self.tokens(input), self.right))

    def _chosen(self, z: Tensor) -> Tensor:
        return coefficients(self._scores(z), self.top)

    def _scores(self, z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z[..., : self.gate], dim=-1)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{super().extra_repr()}, experts={len(self.right)}, rank={self.left.shape[2]}, top={self.top}"


class Padding:
    """The ``attention_mask`` ``[B, T]`` that a network was called with, for its routers; copies start without."""

    mask: Tensor | None = None

    def __getstate__(self) -> None:
        """It is of one forward pass."""

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A hook before ``forward``."""
        self.mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")

    def listen(self, network: nn.Module) -> None:
        """Note the mask whenever the network is called, if any of its modules takes one."""
        hears = (m for m in network.modules() if "attention_mask" in inspect.signature(m.forward).parameters)
        if (first := next(hears, None)) is not None:
            first.register_forward_pre_hook(self.note, with_kwargs=True)

    def mean(self, x: Tensor) -> Tensor:
        """The mean ``[B, N]`` of ``[B, …, N]`` over a sample's tokens, without hidden ones if the mask is of these tokens."""
        if self.mask is None or self.mask.shape != x.shape[:-1]:
            return x.reshape(x.shape[0], -1, x.shape[-1]).mean(1)
        seen = self.mask.to(x.dtype)
        return torch.einsum("bt,btn->bn", seen / seen.sum(1, keepdim=True).clamp(min=1), x)


class Shared:
    """The coefficients ``[B, N]`` that the layers of a block share, from the first to the last; copies start without."""

    def __init__(self, padding: Padding) -> None:
        """With what is known of the samples' tokens."""
        self.padding = padding
        self.c: Tensor | None = None
        #: whether each forward pass begins with a look ahead, and whether this is one
        self.ahead = self.looking = False

    def __getstate__(self) -> dict[str, Any]:
        """Coefficients are of one forward pass."""
        return {"padding": self.padding, "c": None, "ahead": self.ahead, "looking": False}


class Decided(Exception):
    """The layer that decides was reached, so the look ahead may end."""


class LookAhead:
    """A hook before a network's ``forward``: go through the base until the decision, which then holds from the first layer."""

    def __init__(self, shared: Shared) -> None:
        """Of the block that decides."""
        self.shared = shared
        shared.ahead = True

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises LayoutError for a cache of earlier tokens, which a second pass would fill twice."""
        if kwargs.get("past_key_values") is not None:
            raise LayoutError("a mixture that looks ahead sees whole samples: call it with use_cache=False")
        self.shared.looking = True
        try:
            network.forward(*args, **kwargs)
        except Decided:
            pass
        finally:
            self.shared.looking = False


class MergedExperts(Routed, ABC):
    """A linear layer with N experts whose matrices are merged for each sample, by the coefficients of its block.

    The first layer of a block has the block's ``router``: c = its mean over a sample's tokens.  Tokens of padding do not
    count, as far as the network is told of them by an ``attention_mask`` ``[B, T]``.  Any layer of a block can have it where
    the network looks ahead (``LookAhead``).  ``shift`` is d ``[N, m]``, for layers with a bias.  How D is held is up to those
    that implement ``product``.
    """

    def __init__(self, linear: nn.Linear, experts: int, shared: Shared, router: nn.Module | None) -> None:
        """Of this size, on the device ``meta``."""
        super().__init__(linear)
        self.experts, self.shared, self.router = experts, shared, router
        self.shift = None if self.bias is None else self.expected(experts, self.out_features)

    @property
    def decides(self) -> bool:
        """Whether this layer chooses for its block, in this pass."""
        return self.router is not None and self.shared.looking == self.shared.ahead

    @abstractmethod
    def product(self, x: Tensor, c: Tensor) -> Tensor:
        """(W₀ + Σᵢ cᵢDᵢ) x ``[B, T, m]`` of ``[B, T, n]`` and ``[B, N]``."""

    def choice(self, input: Tensor) -> Tensor:
        """The coefficients ``[B, N]`` of samples ``[B, …, n]``.  Raises LayoutError if the block's first layer saw others."""
        if self.decides:
            assert self.router is not None
            return self.shared.padding.mean(self.router(self.tokens(input)))
        c = self.shared.c
        if c is None or c.shape[0] != input.shape[0]:
            raise LayoutError("a layer of a routed block got other samples than its first, by whose input they are routed")
        return c

    def forward(self, input: Tensor) -> Tensor:
        """``[B, …, n]`` → ``[B, …, m]``."""
        if self.shared.looking and not self.decides:
            return self.base(input)
        c = self.shared.c = self.choice(input)
        if self.shared.looking:
            if torch.compiler.is_compiling():  # no exception can be traced; a compiler drops what follows
                return self.base(input)
            raise Decided
        c, tokens = c.to(self.weight.dtype), self.tokens(input)
        y = self.product(tokens.reshape(tokens.shape[0], -1, tokens.shape[-1]), c)
        if self.shift is not None:
            y = y + (self.bias + c @ self.shift)[:, None]
        return self.output(y.view(*tokens.shape[:-1], self.out_features))


class FactoredExperts(MergedExperts):
    """With Dᵢ = LᵢRᵢ: ``right`` is R ``[N, r, n]``, ``left`` L ``[m, N, r]``."""

    def __init__(self, linear: nn.Linear, experts: int, rank: int, shared: Shared, router: nn.Module | None) -> None:
        """See ``MergedExperts``."""
        super().__init__(linear, experts, shared, router)
        self.right = self.expected(experts, rank, self.in_features)
        self.left = self.expected(self.out_features, experts, rank)

    def product(self, x: Tensor, c: Tensor) -> Tensor:
        """Through the factors: no matrix is merged."""
        return F.linear(x, self.matrix) + back(along(x, self.right) * c[:, None, :, None], self.left)


class LowRankOfSample(FactoredExperts):
    """With weights that sum to one: the softmax of what the router gives."""

    def choice(self, input: Tensor) -> Tensor:
        """See ``MergedExperts``."""
        found = super().choice(input)
        return found.softmax(-1) if self.decides else found


class DenseExperts(MergedExperts):
    """With whole matrices: ``deltas`` is D ``[N, m, n]``."""

    def __init__(self, linear: nn.Linear, experts: int, shared: Shared, router: nn.Module | None) -> None:
        """See ``MergedExperts``."""
        super().__init__(linear, experts, shared, router)
        self.deltas = self.expected(experts, self.out_features, self.in_features)

    def product(self, x: Tensor, c: Tensor) -> Tensor:
        """See ``MergedExperts``."""
        return per_sample(x, c, self.matrix, self.deltas)


class SparseExperts(MergedExperts):
    """With pruned matrices, as ``_products`` packs them: ``gaps`` and ``values`` ``[e]``, of which tiles have ``counts``."""

    def __init__(self, linear: nn.Linear, experts: int, shared: Shared, router: nn.Module | None, counts: list[int]) -> None:
        """See ``MergedExperts``.  Raises LayoutError for counts that are not those of this layer's tiles."""
        super().__init__(linear, experts, shared, router)
        if len(counts) != len(tiles((self.out_features, self.in_features))):
            raise LayoutError(f"pruned experts in {len(counts)} tiles are no experts of a layer {list(self.matrix.shape)}")
        self.counts, self.values = counts, self.expected(sum(counts))
        self.register_buffer("gaps", torch.empty(sum(counts), dtype=torch.uint8, device="meta"))

    def product(self, x: Tensor, c: Tensor) -> Tensor:
        """See ``MergedExperts``."""
        return sparse_per_sample(x, c, self.matrix, self.get_buffer("gaps"), self.values, self.counts)
