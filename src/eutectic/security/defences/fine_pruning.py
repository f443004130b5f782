"""Fine-pruning: hidden units that clean inputs leave asleep are cut off, and what is left is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence_from, expert_outputs
from eutectic.methods._method import Count, Fraction, Positive
from eutectic.security.defences._defended import Path, fill_with, merged, over, taught, trained, tuned
from eutectic.security.defences._units import activity, agreeing, cut, furthest, hidden_units, scaled
from eutectic.task import Task

REFERENCE = (
    "Liu et al., Fine-pruning: defending against backdooring attacks on deep neural networks, RAID 2018, arXiv:1805.12185"
)
#: shares of the units that are tried, from nothing on
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def fine_pruning(
    budget: Fraction = 0.05,
    steps: Count = 60,
    lr: Positive = 2e-5,
    batch_size: Count = 8,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Cut off the hidden units of a merge's MLPs that are least active on clean inputs, and tune the rest.

        s_j = Σ_x |a_j(x)|,     θ′ = θ_m without the share q of each MLP's units that have the least s_j
        θ = θ′ after some steps of   min  Σ_tasks KL( p_k(x; θ_k) ‖ p(x; θ) ),   with the same units cut

    q is the largest share with which predictions on held-out inputs agree with the experts' as often as θ_m's do, less
    ``budget``.  Needs unlabelled inputs, of any kind; it sees no trigger.

    Args:
        budget: how much of the agreement with the experts may be lost by pruning, before tuning.
        steps: of Adam on all weights.
        lr: Adam's.
        batch_size: of each task.
        method: the merge that is defended.
        parameters: of that method.

    Raises LayoutError for a network without MLPs, with its layers.

    Source: Liu et al., RAID 2018, arXiv:1805.12185.  Differs from the paper in that units are those of all MLPs, as many of
    each, where theirs are the channels of the last convolution; that an activation counts by its magnitude, as a GELU's has
    both signs; and in the experts' predictions as labels.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network, units = over(method, parameters), models.network, hidden_units(models.network)
        batches, teacher = Batches(run, tasks, batch_size), expert_outputs(models, tasks, run)
        path = Path(fill_with(network, merged(models.base, models.experts, about)))
        sums = activity(network, units, batches, run)
        kept = {share: {name: awake(one, share) for name, one in sums.items()} for share in SHARES}
        looked = agreeing(network, units, kept, batches, teacher, run)
        share = furthest(looked, budget)
        with scaled(units, kept[share]):  # what is cut off has no gradient
            history = taught(path, network, batches, divergence_from(teacher), run, steps=steps, lr=lr)
        cut(units, kept[share])
        return trained(models, about | {"share": share, "looked": looked, "history": history})

    return Fusion(fit, tuned)


def awake(activity: Tensor, share: float) -> Tensor:
    """1 for each unit ``[width]`` that is kept, 0 for the ``share`` of them with the least activity."""
    kept = torch.ones_like(activity)
    kept[activity.argsort(stable=True)[: round(share * len(activity))]] = 0
    return kept
