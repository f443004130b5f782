"""The one equation over a network's tensors, θ = θ₀ + m̂ ⊙ Σₖ λₖ τₖ, with its gradients in closed form.

One ordinary backward pass leaves G = ∂L/∂θ in the network's ``.grad``, summed over tasks.  θ is linear in λ and in m̂, so for
each tensor

    ∂L/∂λₖ = ⟨G, m̂ ⊙ τₖ⟩          ∂L/∂m̂ = G ⊙ Σₖ λₖ τₖ

No graph runs through the merge, and nothing is kept for each task: memory is θ, θ₀, G and the task vectors, if these are held.
Where all experts are adapters, τₖ = LₖRₖ stays two thin matrices: Σ λₖτₖ is [λ₁L₁ … λ_K L_K] [R₁; …; R_K], and ⟨G, τₖ⟩ the sum
of GRₖᵀ ⊙ Lₖ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, thin_over
from eutectic.errors import LayoutError, NonFiniteError

#: elements of a tensor that are worked on at once: K times as many in float32 stay in the caches
CHUNK = 1 << 17


class Vectors(ABC):
    """The experts' task vectors of one tensor; parts of it begin and end at multiples of ``row`` elements."""

    row: int = 1

    @abstractmethod
    def total(self, part: slice, weights_K: Tensor) -> Tensor:
        """Σ λₖ τₖ of a part, ``[n]``, in the dtype of the weights."""

    @abstractmethod
    def products(self, part: slice, gradient: Tensor) -> Tensor:
        """⟨G, τₖ⟩ over a part ``[n]`` of G, ``[K]``."""


@final
class Dense(Vectors):
    """Whole task vectors, held or read."""

    def __init__(self, of: Callable[[slice], Tensor]) -> None:
        """``of`` gives τ ``[K, n]`` of a part, in the dtype in which it is held."""
        self.of = of

    def total(self, part: slice, weights_K: Tensor) -> Tensor:
        """See ``Vectors``."""
        return torch.mv(self.of(part).to(weights_K.dtype).T, weights_K)

    def products(self, part: slice, gradient: Tensor) -> Tensor:
        """See ``Vectors``."""
        return torch.mv(self.of(part).to(gradient.dtype), gradient)


@final
class LowRank(Vectors):
    """Those of adapters: L ``[m, R]`` and R ``[R, n]`` with the experts' factors side by side, ``owner`` ``[R]`` says whose."""

    def __init__(self, left: Tensor, right: Tensor, owner: Tensor, experts: int) -> None:
        """Hold by reference."""
        self.left, self.right, self.owner, self.experts, self.row = left, right, owner, experts, right.shape[1]

    def total(self, part: slice, weights_K: Tensor) -> Tensor:
        """See ``Vectors``."""
        return ((self._rows(part) * weights_K[self.owner]) @ self.right).flatten()

    def products(self, part: slice, gradient: Tensor) -> Tensor:
        """See ``Vectors``."""
        along = (gradient.view(-1, self.row) @ self.right.T).mul_(self._rows(part)).sum(0)
        return along.new_zeros(self.experts).index_add_(0, self.owner, along)

    def _rows(self, part: slice) -> Tensor:
        return self.left[part.start // self.row : part.stop // self.row]


class Site(NamedTuple):
    """A tensor whose coefficients are fitted: its name, those of tensors tied to it, and what it is made of."""

    name: str
    aliases: tuple[str, ...]
    parameter: Tensor
    base: Tensor  # [p]
    vectors: Vectors


class Weighted:
    """θ₀ of a network, in memory, and the task vectors.

    ``sites`` are the parameters that require a gradient and that some expert changed, in the network's order.  What else the
    experts changed (buffers, frozen parameters) is set once, with the given fixed weights, and is no site.  Tied parameters
    are one site.  What is no site requires no gradient any more, so that none is computed.
    """

    def __init__(
        self,
        network: nn.Module,
        base: Checkpoint,
        vectors: Mapping[str, Checkpoint],
        storage: torch.dtype | None = torch.bfloat16,
        fixed: Sequence[float] | None = None,
    ) -> None:
        """Read θ₀ and the experts; ``fixed`` are the weights of what is no site, 1 / K each by default.

        Task vectors are held in memory in the dtype ``storage``; with None only those of small tensors are, and unrounded:
        each use of a larger one reads the experts once more, in parts.  Those of adapters are held as their factors.  Sums are
        float32, or float64 in a float64 network.
        Raises LayoutError if a parameter is in no checkpoint or there is no site, NonFiniteError naming an expert and tensor
        that hold a NaN or Inf.
        """
        self.network = network
        self.names = list(vectors)
        fixed = [1 / len(vectors)] * len(vectors) if fixed is None else fixed
        groups: dict[int, list[str]] = {}
        tensors: dict[str, Tensor] = {}
        state = network.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if tensor.dtype.is_floating_point:
                groups.setdefault(id(tensor), []).append(name)
                tensors[name] = tensor
        self.sites: list[Site] = []
        self.fixed: list[str] = []
        for group in groups.values():
            known = [name for name in group if name in base.specs]
            if not known:
                raise LayoutError(f"the network has {group[0]!r}, which {base.origin} lacks: is it another network's base?")
            tensor = tensors[group[0]]
            site = self._site(known, tensor, base, vectors, storage)
            if site is not None and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                self.sites.append(site)
                continue
            tensor.requires_grad_(False)
            if site is None:
                continue
            self.fixed += known
            _assign(site, torch.tensor(fixed, dtype=torch.float64))
        if not self.sites:
            raise LayoutError("no expert differs from the base in what can be trained, so there is nothing to fit")

    @property
    def shape(self) -> tuple[int, int]:
        """K and L."""
        return len(self.names), len(self.sites)

    @torch.no_grad()
    def write(self, weights_KL: Tensor, mask: Sequence[Tensor] | None = None) -> None:
        """Set the network to θ, and its gradients to 0; ``weights_KL`` ``[K, L]``, ``mask`` the m̂ ``[p]`` of each site.

        Gradients stay where they are: made anew in each step, they and the passes' activations would leave holes in memory.
        """
        for at, site in enumerate(self.sites):
            _assign(site, weights_KL[:, at], None if mask is None else mask[at])
            if site.parameter.grad is None:
                site.parameter.grad = torch.empty_like(site.parameter)
            site.parameter.grad.zero_()

    @torch.no_grad()
    def weight_gradient(self, mask: Sequence[Tensor] | None = None) -> Tensor:
        """∂L/∂λ ``[K, L]`` of what ``backward`` left, in float64."""
        found = torch.zeros(self.shape, dtype=torch.float64)
        for at, site in enumerate(self.sites):
            gradient = _flat_gradient(site)
            total = torch.zeros(len(self.names), dtype=torch.float64)
            for part in _parts(site):
                g = gradient[part] if mask is None else gradient[part] * mask[at][part]
                total += site.vectors.products(part, g).cpu()
            found[:, at] = total
        return found

    @torch.no_grad()
    def mask_gradient(self, weights_KL: Tensor) -> Iterator[Tensor]:
        """∂L/∂m̂ ``[p]`` of each site, in order: made in the place of G, and good until the next ``write``."""
        for at, site in enumerate(self.sites):
            gradient = _flat_gradient(site)
            weights = weights_KL[:, at].to(site.base)
            for part in _parts(site):
                gradient[part] *= site.vectors.total(part, weights)
            yield gradient

    def _site(
        self, names: list[str], tensor: Tensor, base: Checkpoint, vectors: Mapping[str, Checkpoint], storage: torch.dtype | None
    ) -> Site | None:
        """None if no expert changed it."""
        name, wide = names[0], torch.promote_types(tensor.dtype, torch.float32)
        start = base.read(name).reshape(-1).to(tensor.device, wide)
        if start.data_ptr() == tensor.data_ptr():  # a base that is the network itself would follow it
            start = start.clone()
        factors = _low_rank(name, base, vectors, start)
        if factors is not None:
            changed = bool((factors.left.any(0) & factors.right.any(1)).any())
            return Site(name, tuple(names[1:]), tensor, start, factors) if changed else None
        p = start.numel()

        def read(part: slice) -> Tensor:
            return torch.stack([c.read_flat(name, part.start, part.stop).to(start) for c in vectors.values()]).sub_(start[part])

        held = None
        if storage is not None or p <= CHUNK:
            held = start.new_empty(len(vectors), p, dtype=wide if wide == torch.float64 else storage)
        changed = False
        for at, (expert, checkpoint) in enumerate(vectors.items()):
            delta = checkpoint.read(name).reshape(-1).to(start) - start
            _require_finite(delta, expert, checkpoint, name)
            changed = changed or bool(delta.any())
            if held is not None:
                held[at] = delta
        if not changed:
            return None
        return Site(name, tuple(names[1:]), tensor, start, Dense(read if held is None else lambda part: held[:, part]))


def _low_rank(name: str, base: Checkpoint, vectors: Mapping[str, Checkpoint], start: Tensor) -> LowRank | None:
    """The experts' factors like ``start``, if all have some for this matrix, and these are fewer numbers than task vectors."""
    parts, size = list[tuple[Tensor, Tensor]](), 0
    for expert, checkpoint in vectors.items():
        thin = thin_over(base, checkpoint, name)
        if thin is None:
            return None
        for factor in (thin.left, thin.right):
            _require_finite(factor, expert, checkpoint, name)
        parts.append((thin.left.to(start), thin.right.to(start)))
        size += thin.left.numel() + thin.right.numel()
    if size >= len(parts) * start.numel():
        return None
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(right) for _, right in parts])).to(start.device)
    return LowRank(torch.cat([left for left, _ in parts], 1), torch.cat([right for _, right in parts]), owner, len(parts))


def _require_finite(tensor: Tensor, expert: str, checkpoint: Checkpoint, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(f"expert {expert!r} ({checkpoint.origin}) or the base holds a NaN or Inf in {name!r}")


def _parts(site: Site) -> Iterator[slice]:
    p, step = site.base.numel(), max(CHUNK // site.vectors.row, 1) * site.vectors.row
    return (slice(low, min(low + step, p)) for low in range(0, p, step))


@torch.no_grad()
def _assign(site: Site, weights_K: Tensor, mask: Tensor | None = None) -> None:
    theta, weights_K = site.parameter.detach().reshape(-1), weights_K.to(site.base)
    for part in _parts(site):
        direction = site.vectors.total(part, weights_K)
        if mask is not None:
            direction.mul_(mask[part])
        theta[part] = direction.add_(site.base[part])
    if theta.data_ptr() != site.parameter.data_ptr():
        site.parameter.copy_(theta.view(site.parameter.shape))


def _flat_gradient(site: Site) -> Tensor:
    """G ``[p]`` in the dtype of θ₀; written through if it can be."""
    gradient = site.parameter.grad
    assert gradient is not None  # ``write`` made it
    return gradient.reshape(-1).to(site.base.dtype)
