"""The Concrete mask: one for all experts, sampled while it is learned, fixed when it is used.

One logit xⱼ for each weight.  A sample is m = σ((x + log u − log(1 − u)) / T) with u uniform: the binary Concrete distribution
(Maddison et al., ICLR 2017, arXiv:1611.00712).  Of each tensor m̂ = m / mean(m) is used, so that a change keeps its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from eutectic.checkpoint.base import Memory
from eutectic.fusion._coefficients import Per, facts, weighted
from eutectic.fusion._fit import (
    Batches,
    Descended,
    Loss,
    backward,
    descend,
    generator,
    held_out_loss,
    mean_over_processes,
)
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._weighted import Weighted
from eutectic.merge.view import Merged
from eutectic.task import Task

Export = Literal["mean", "hard", "sample"]
#: a mask that keeps less of a tensor is not scaled up any further
LEAST = 1e-3


def sampled(logits: Tensor, temperature: float, noise: torch.Generator) -> Tensor:
    """A sample m of a tensor's mask, in (0, 1)."""
    u = torch.rand(logits.shape, generator=noise, dtype=logits.dtype).clamp_(1e-6, 1 - 1e-6).to(logits.device)
    return u.logit_().add_(logits).div_(temperature).sigmoid_()


def rescaled(mask: Tensor) -> tuple[Tensor, float]:
    """m̂ = m / mean(m), in place, and the mean."""
    mean = max(float(mean_of(mask)), LEAST)
    return mask.div_(mean), mean


def mean_of(x: Tensor) -> Tensor:
    """The mean, summed in float64."""
    return x.sum(dtype=torch.float64) / max(1, x.numel())


def logit_gradient(mask_gradient: Tensor, scaled: Tensor, mean: float, temperature: float) -> Tensor:
    """∂L/∂x from ∂L/∂m̂, which it is made in the place of; ``scaled`` is m̂.

    With a = ∂L/∂m̂:  ∂L/∂m = (a − mean(a ⊙ m̂)) / mean(m),   ∂m/∂x = m (1 − m) / T.
    """
    # where the mean is held at its least, it is a constant
    inner = float(mean_of(mask_gradient * scaled)) if mean > LEAST else 0.0
    mask = scaled * mean
    return mask_gradient.sub_(inner).div_(mean).mul_(mask.mul_(1 - mask)).div_(temperature)


def exported(logits: Sequence[Tensor], how: Export, temperature: float, seed: int) -> list[Tensor]:
    """The m̂ that is used: of the mean of the hard mask σ(x), of the hard mask 1[x ≥ 0], or of one seeded sample."""
    found = []
    noise = generator(seed, "export")
    for x in logits:
        match how:
            case "mean":
                mask = x.sigmoid()
            case "hard":
                mask = (x >= 0).to(x.dtype)
            case "sample":
                mask = sampled(x, temperature, noise)
        found.append(rescaled(mask)[0])
    return found


def named(equation: Weighted, masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Masks by the names that an artefact has for them, in half precision."""
    return {f"mask.{site.name}": mask.half().cpu() for site, mask in zip(equation.sites, masks, strict=True)}


def masked(
    loss_of: Callable[[ModelSet, Sequence[Task], Run], Loss],
    *,
    steps: int,
    lr: float,
    temperature: float,
    batch_size: int,
    patience: int,
    export: Export,
    method: str,
    parameters: Mapping[str, Any] | None,
) -> Fusion:
    """The fusion that masks a merge, for the loss that ``loss_of`` makes of the models and tasks."""

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches = Batches(run, tasks, batch_size)
        loss = loss_of(models, tasks, run)
        merged = Merged(method, models.base, models.experts, parameters or {})
        equation = Weighted(models.network, models.base, {"merge": merged}, fixed=[1.0])
        mask = ConcreteMask(equation, temperature, run.seed)
        start = torch.ones(equation.shape, dtype=torch.float64)
        found = fit_mask(mask, start, batches, loss, run, steps=steps, lr=lr, inner_lr=0.0, patience=patience, export=export)
        mask.logits = found.tensors
        masks = exported(list(mask.logits.values()), export, temperature, run.seed)
        about = facts(equation, method, merged.parameters) | {"history": found.history, "density": mask.density()}
        return Artefact(Memory(named(equation, masks)), about)

    return Fusion(fit, weighted)


class ConcreteMask:
    """The logits of every site, with samples and gradients for a fit."""

    def __init__(self, equation: Weighted, temperature: float, seed: int) -> None:
        """All logits 0."""
        self.equation, self.temperature, self._seed = equation, temperature, seed
        self.logits = {site.name: torch.zeros_like(site.base) for site in equation.sites}
        self.means: list[float] = []

    def sample(self, *key: object) -> list[Tensor]:
        """The m̂ of one draw."""
        noise = generator(self._seed, *key)
        pairs = [rescaled(sampled(x, self.temperature, noise)) for x in self.logits.values()]
        self.means = [mean for _, mean in pairs]
        return [mask for mask, _ in pairs]

    def gradient(self, weights_KL: Tensor, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """∂L/∂x of what ``backward`` left, at the last sample."""
        found = {}
        gradients = self.equation.mask_gradient(weights_KL)
        for name, mask, mean, gradient in zip(self.logits, masks, self.means, gradients, strict=True):
            found[name] = logit_gradient(gradient, mask, mean, self.temperature)
        return found

    def density(self) -> dict[str, float]:
        """The share of weights that the hard mask keeps, of all and at the extremes among tensors."""
        kept = {name: float((x >= 0).double().mean()) for name, x in self.logits.items()}
        total = sum(x.numel() for x in self.logits.values())
        return {
            "all": sum(kept[name] * x.numel() for name, x in self.logits.items()) / max(1, total),
            "least": min(kept.values()),
            "most": max(kept.values()),
        }


def fit_mask(
    mask: ConcreteMask,
    start_KL: Tensor,
    batches: Batches,
    loss: Loss,
    run: Run,
    *,
    steps: int,
    lr: float,
    inner_lr: float,
    patience: int,
    export: Export = "mean",
    per: Per = "tensor",
) -> Descended:
    """Logits that minimise a loss, each step at weights that one step from ``start_KL`` has adapted to the mask.

    The inner step comes first, at the start's weights and a sample of its own, and moves each weight by ``inner_lr`` against
    the sign of its gradient: Adam's first step.  With ``inner_lr`` 0 there is none.  The outer step takes weights as constants.
    Which logits are best is judged at ``start_KL`` and the mask as it is exported.
    """
    equation = mask.equation

    def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
        weights = start_KL
        if inner_lr:
            masks = mask.sample(step, "inner")
            equation.write(weights, masks)
            backward(equation.network, batches, 2 * step, loss, run)
            slope = mean_over_processes(equation.weight_gradient(masks))
            if per == "task":
                slope = slope.sum(1, keepdim=True).expand_as(slope)
            weights = weights - inner_lr * slope.sign()
        masks = mask.sample(step, "outer")
        equation.write(weights, masks)
        value = backward(equation.network, batches, 2 * step + 1 if inner_lr else step, loss, run)
        return value, mask.gradient(weights, masks)

    def criterion() -> float:
        equation.write(start_KL, exported(list(mask.logits.values()), export, mask.temperature, run.seed))
        return held_out_loss(equation.network, batches, loss, run)

    return descend("mask", mask.logits, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
