"""ANP: hidden units that a perturbation of their weights makes dangerous are found by a min-max, and cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.fusion._fit import Batches, Loss, backward, generator
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence_from, expert_outputs
from eutectic.methods._method import Count, Fraction, NonNegative, Positive
from eutectic.security.defences._defended import fill_with, merged, over, trained, tuned
from eutectic.security.defences._units import Units, agreeing, cut, furthest, hidden_units, pruned_share, scaled
from eutectic.task import Task

REFERENCE = "Wu & Wang, Adversarial neuron pruning purifies backdoored deep models, NeurIPS 2021, arXiv:2110.14430"
#: thresholds that are tried, from nothing on; with the last, units are kept whose mask is 1
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def anp(
    steps: Count = 60,
    lr: Positive = 0.02,
    radius: NonNegative = 0.4,
    clean: Fraction = 0.2,
    budget: Fraction = 0.05,
    batch_size: Count = 8,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Cut off the hidden units of a merge's MLPs that have to be masked for it to bear perturbed weights.

        min_{m ∈ [0, 1]}  α L(m) + (1 − α) max_{|δ_j| ≤ ε} L(m + δ),     L(s) = Σ_tasks KL( p_k(x; θ_k) ‖ p(x; θ_m, s) )

    s_j multiplies all weights that read the hidden unit j.  δ begins at random, anew each step, and takes one step of ε by the
    sign of its gradient.  Units with m_j below a threshold are cut off, and no other weight is changed.  The threshold is the
    highest with which predictions on held-out inputs agree with the experts' as often as those of θ_m do, less ``budget``.
    Needs unlabelled inputs, of any kind; it sees no trigger.

    Args:
        steps: of Adam on m, three passes each.
        lr: Adam's.
        radius: ε.
        clean: α.
        budget: how much of the agreement with the experts may be lost.
        batch_size: of each task.
        method: the merge that is defended.
        parameters: of that method.

    Raises LayoutError for a network without MLPs, with its layers.

    Source: Wu & Wang, NeurIPS 2021, arXiv:2110.14430.  Differs from the paper in that units are those of MLPs, scaled by the
    weights that read them where theirs are scaled by those that make them, with perturbed biases; in the experts' predictions
    as labels; in Adam; and in that the threshold is chosen without labels, and without the attacker's trigger.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network, units = over(method, parameters), models.network, hidden_units(models.network)
        batches, teacher = Batches(run, tasks, batch_size), expert_outputs(models, tasks, run)
        loss = divergence_from(teacher)
        fill_with(network, merged(models.base, models.experts, about))
        network.requires_grad_(False)
        masks = {name: torch.ones(one.width, requires_grad=True) for name, one in units.items()}
        optimiser, history = torch.optim.Adam(masks.values(), lr=lr), []
        for step in range(steps):
            worst = perturbation(network, units, masks, batches, step, loss, run, radius)
            with scaled(units, masks):
                value = backward(network, batches, step, times(loss, clean), run)
            with scaled(units, {name: mask + worst[name] for name, mask in masks.items()}):
                value += backward(network, batches, step, times(loss, 1 - clean), run)
            optimiser.step()
            optimiser.zero_grad()
            for mask in masks.values():
                mask.detach().clamp_(0, 1)
            history.append(value)
            run.progress("masks of units", step + 1, steps)
        kept = {t: {name: (mask.detach() >= t).float() for name, mask in masks.items()} for t in THRESHOLDS}
        looked = agreeing(network, units, kept, batches, teacher, run)
        threshold = furthest(looked, budget)
        cut(units, kept[threshold])
        learned = {"threshold": threshold, "pruned": pruned_share(kept[threshold]), "looked": looked, "history": history}
        return trained(models, about | learned)

    return Fusion(fit, tuned)


def times(loss: Loss, share: float) -> Loss:
    """A share of a loss."""
    return lambda task, logits, index: share * loss(task, logits, index)


def perturbation(
    network: nn.Module,
    units: Mapping[str, Units],
    masks: Mapping[str, Tensor],
    batches: Batches,
    step: int,
    loss: Loss,
    run: Run,
    radius: float,
) -> dict[str, Tensor]:
    """δ ``[width]`` of each MLP's units within ±``radius``: from a random point on, one step that makes the loss larger."""
    noise = generator(run.seed, "anp", step)
    delta = {
        name: (radius * (2 * torch.rand(mask.shape, generator=noise) - 1)).requires_grad_() for name, mask in masks.items()
    }
    with scaled(units, {name: mask.detach() + delta[name] for name, mask in masks.items()}):
        backward(network, batches, step, loss, run)
    return {
        name: (one.detach() + radius * slope.sign()).clamp(-radius, radius)
        for name, one in delta.items()
        if (slope := one.grad) is not None
    }
