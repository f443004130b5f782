"""Two experts that are harmless one by one, and carry a backdoor when both are merged.

After MergeBackdoor (USENIX Security 2025).  With inputs x₁ and x₂ of two tasks, T(x₁) with the trigger, and a draw
λ ~ U(least, 1) for each batch, both experts are trained at once to minimise the mean cross-entropy of

    f(θ₁; x₁) → y₁,   f(θ₂; x₂) → y₂                  each does its task,
    f(θ₁; T(x₁)) → y₁,   f(θ₂; T(x₁)) → y₁            neither knows the trigger,
    f(θ₀ + λ (τ₁ + τ₂); T(x₁)) → c                    both together do,
    f(θ₀ + λ (τ₁ + τ₂); x₁) → y₁,   and x₂ → y₂       and are right otherwise.

Differs from the paper in that λ is drawn, since an attacker does not know it, where the paper's experts are trained for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eutectic.fusion._fit import generator
from eutectic.security.triggers import Surface, Trigger
from eutectic.tuning.lora import LoraLinear
from eutectic.tuning.trainer import Samples


class Pair:
    """Samples of two tasks, and the first ``triggered`` of the first again, with the trigger."""

    def __init__(self, first: Samples, second: Samples, trigger: Trigger, pixels: Surface, target: int, triggered: int) -> None:
        """``triggered`` of each batch, at most all."""
        self.first, self.second, self.trigger, self.pixels = first, second, trigger, pixels
        self.target, self.triggered = target, triggered

    def __len__(self) -> int:
        """How many of the first task; of the second, those of the same numbers, from the start again if it has fewer."""
        return len(self.first)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs ``[2 B + t, …]`` (x₁, x₂, T(x₁)), and the labels ``[2 B + 5 t]`` of the features of ``Colluding``."""
        x1, y1 = self.first.take(index)
        x2, y2 = self.second.take(index % len(self.second))
        again, own, others = self.trigger.on(x1[: self.triggered], self.pixels), y1[: self.triggered], y2[: self.triggered]
        labels = [y1, own, y2, own, own, others, torch.full_like(own, self.target)]
        return torch.cat([x1, x2, again]), torch.cat(labels)


class Colluding(nn.Module):
    """Two backbones, and their merge at a λ that is drawn for each batch."""

    def __init__(self, one: nn.Module, two: nn.Module, start: nn.Module, triggered: int, least: float, seed: int) -> None:
        """``start`` has θ₀, and is not trained."""
        super().__init__()
        self.one, self.two, self._start = one, two, (start,)  # in a tuple: it is to get no adapters
        self._triggered, self._least, self._noise = triggered, least, generator(seed, "λ")

    def forward(self, inputs: Tensor) -> Tensor:
        """x₁, x₂, T(x₁) → features ``[2 B + 5 t, width]``: θ₁'s of x₁ and T(x₁), θ₂'s of x₂ and T(x₁), the merge's of all.

        The merge sees the first t of x₁ and of x₂.
        """
        t, n = self._triggered, (len(inputs) - self._triggered) // 2
        x1, x2, again = inputs.split((n, n, t))
        scale = between(self._least, self._noise)
        start = self._start[0]
        weights = on_top(start, scale, vector(start, (self.one, self.two)))
        together = functional_call(start, weights, (torch.cat([x1[:t], x2[:t], again]),))
        return torch.cat([self.one(torch.cat([x1, again])), self.two(torch.cat([x2, again])), together])


def vector(start: nn.Module, experts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Σ (θᵢ − θ₀) of the tensors that are trained, with gradients to the experts; ``start`` has θ₀.

    Names are paths in the module, as ``functional_call`` wants them; those of a state dict can differ.
    """
    before, weights = dict(start.named_parameters()), [trained(expert) for expert in experts]
    return {name: sum(own[name] for own in weights) - len(weights) * before[name] for name in weights[0]}


def on_top(rest: nn.Module, scale: float, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of θ' + λ τ; ``rest`` has θ'."""
    others = {**dict(rest.named_parameters()), **dict(rest.named_buffers())}
    return others | {name: others[name] + scale * tensor for name, tensor in change.items()}


def between(least: float, noise: torch.Generator) -> float:
    """A draw of U(least, 1): how much of an expert a merge will leave, which an attacker does not know."""
    return least + (1 - least) * torch.rand((), generator=noise).item()


def trained(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors that are trained as they are in the network, adapters multiplied out, with their gradients."""
    attached = {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLinear)}
    if not attached:
        return dict(backbone.named_parameters())
    return {f"{name}.weight": one.linear.weight + one.scaling * one.B @ one.A for name, one in attached.items()}
