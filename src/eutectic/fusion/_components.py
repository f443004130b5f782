"""The equation over the singular components of a network's matrices, θ = θ₀ + Σₖ λₖ Σ_r Bₖ_r σ_r u_r v_rᵀ, and what it leaves.

θ is linear in λ and in B, so one ordinary backward pass gives both gradients in closed form: with c_r = σ_r u_rᵀ G v_r they are
∂L/∂λₖ = Σ_r Bₖ_r c_r and ∂L/∂Bₖ_r = λₖ c_r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, Spread, thin_over
from eutectic.checkpoint.spec import Layout
from eutectic.fusion._weighted import Dense, Site, Weighted
from eutectic.merge.view import rounding
from eutectic.methods._method import Scope
from eutectic.methods._spectral import WORKSPACE, matrix_scope, svd, svd_of_product
from eutectic.methods._threads import one_torch_thread


class Matrix(NamedTuple):
    """A matrix's singular components, those of all experts side by side: Σ_r strength_r u_r (σ_r v_rᵀ)."""

    site: Site  # without its vectors
    owner: Tensor  # [R], whose component it is
    place: Tensor  # [R], its place in that expert's order, the strongest first
    U: Tensor  # [m, R]
    A: Tensor  # [R, n], diag(σ) Vᵀ

    def strongest(self, share: float) -> Tensor:
        """1 for the share of each expert's components that are its strongest, else 0, ``[R]``."""
        count = torch.bincount(self.owner)[self.owner]  # of its owner's
        return (self.place < (share * count).round().clamp(min=1)).to(self.A)

    def by_expert(self, kept: Tensor, k: int) -> Tensor:
        """``kept`` ``[R]`` as ``[K, most]``, with a row for each expert that ends in False."""
        found = torch.zeros(k, int(self.place.max()) + 1, dtype=torch.bool, device=kept.device)
        found[self.owner, self.place] = kept
        return found


class Pruned:
    """θ₀ and the components of a network's matrices in memory, with the task vectors of its other tensors.

    ``sites`` are those of ``Weighted``, matrices last.  Memory is about twice the matrices' task vectors in float32.
    """

    def __init__(self, network: nn.Module, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
        """Read and decompose.  Raises as ``Weighted`` does."""
        self.network, self.rest, self.matrices = network, Weighted(network, base, experts), list[Matrix]()
        sites, self.rest.sites = self.rest.sites, []
        while sites:  # so that each one's vectors are gone when the next is decomposed
            site, parts = sites.pop(0), []
            if matrix_scope(site.name, tuple(site.parameter.shape)) is Scope.TENSOR:
                parts = [components(base, expert, site.name) for expert in experts.values()]
            if any(len(A) for _, A in parts):
                self.matrices.append(_matrix(site, parts))
            else:
                self.rest.sites.append(site)

    @property
    def sites(self) -> list[Site]:
        """L tensors whose coefficients are fitted."""
        return self.rest.sites + [matrix.site for matrix in self.matrices]

    @torch.no_grad()
    def write(self, weights_KL: Tensor, bits: Sequence[Tensor]) -> None:
        """Set the network to θ; ``bits`` are B ``[R]`` of each matrix, in [0, 1].  Gradients are dropped."""
        first = len(self.rest.sites)
        self.rest.write(weights_KL[:, :first], None)
        for weights, matrix, kept in zip(weights_KL[:, first:].T, self.matrices, bits, strict=True):
            parameter = matrix.site.parameter
            strength = weights.to(matrix.A)[matrix.owner] * kept
            at = strength.nonzero()[:, 0]
            base = matrix.site.base.view(parameter.shape)
            parameter.copy_(torch.addmm(base, matrix.U[:, at] * strength[at], matrix.A[at]))
            parameter.grad = None

    @torch.no_grad()
    def gradient(self, weights_KL: Tensor, bits: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """∂L/∂λ ``[K, L]`` in float64, and ∂L/∂B ``[R]`` of each matrix, of what ``backward`` left."""
        first = len(self.rest.sites)
        by_weight, by_bit = torch.zeros_like(weights_KL), []
        by_weight[:, :first] = self.rest.weight_gradient()
        for at, (matrix, kept) in enumerate(zip(self.matrices, bits, strict=True), start=first):
            G = matrix.site.parameter.grad
            c = torch.zeros_like(kept) if G is None else ((matrix.U.T @ G.to(matrix.A)) * matrix.A).sum(1)
            by_weight[:, at].index_add_(0, matrix.owner.cpu(), (kept * c).cpu().to(by_weight))
            by_bit.append(weights_KL[:, at].to(c)[matrix.owner] * c)
        return by_weight, by_bit


def components(base: Checkpoint, expert: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """U ``[m, r]`` and diag(σ) Vᵀ ``[r, n]`` of a matrix's task vector, the strongest first; none that is rounding.

    An adapter's are those of its factors, whose product is not formed.
    """
    thin = thin_over(base, expert, name)
    if thin is not None:
        wide = torch.promote_types(thin.start.dtype, torch.float32)
        found = svd_of_product(thin.left.to(wide), thin.right.to(wide))
        return found.U, found.s[:, None] * found.Vh
    start, moved = base.read(name), expert.read(name)
    wide = torch.promote_types(start.dtype, torch.float32)
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (start, moved))
    with one_torch_thread():
        found = svd(moved.to(wide) - start.to(wide), rounding(start.to(wide), eps))
        return found.U, found.s[:, None] * found.Vh


def _matrix(site: Site, parts: Sequence[tuple[Tensor, Tensor]]) -> Matrix:
    device, counts = site.base.device, torch.tensor([len(A) for _, A in parts])
    owner = torch.arange(len(parts)).repeat_interleave(counts)
    place = torch.cat([torch.arange(count) for count in counts.tolist()])
    U, A = torch.cat([U for U, _ in parts], dim=1), torch.cat([A for _, A in parts])
    nothing = site.base.new_empty(len(parts), 0)  # its components take the vectors' place
    empty = site._replace(vectors=Dense(lambda part: nothing))
    return Matrix(empty, owner.to(device), place.to(device), U.to(device), A.to(device))


@final
class Truncated(Checkpoint):
    """An expert with less of its change: of the matrices named in ``kept`` only those components of the task vector.

    These are float32 (float64 for float64), so that a base in half precision does not round what is left.  It owns nothing.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, kept: Mapping[str, Tensor]) -> None:
        """``kept`` is name → which components, ``[r]``, the strongest first; what it does not reach is dropped."""
        self._base, self._expert, self._kept = base, expert, dict(kept)
        self.origin, self.files = f"components of {expert.origin}", tuple(dict.fromkeys(expert.files + base.files))
        self._specs = {
            name: spec._replace(dtype=torch.promote_types(spec.dtype, torch.float32)) if name in kept else spec
            for name, spec in expert.specs.items()
        }

    @property
    def specs(self) -> Layout:
        """The expert's, matrices in the dtype that they are computed in."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._kept:
            return self._expert._read(name, start, stop)
        U, A = components(self._base, self._expert, name)
        at = self._kept[name][: len(A)].nonzero()[:, 0]
        with one_torch_thread():
            return torch.addmm(self._base.read(name).to(A), U[:, at], A[at]).reshape(-1)[start:stop]

    def grain(self, name: str) -> int:
        """A matrix is decomposed as a whole."""
        return self.specs[name].numel if name in self._kept else self._expert.grain(name)

    def need_bytes(self, name: str, n: int) -> int:
        """The expert's, or what decomposing takes."""
        if name not in self._kept:
            return self._expert.need_bytes(name, n)
        n = self.specs[name].numel
        return self._base.need_bytes(name, n) + self._expert.need_bytes(name, n) + n * (WORKSPACE + 3 * 8)

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """As the base and the expert."""
        self._base.prepare(names, spread)
        self._expert.prepare(names, spread)
