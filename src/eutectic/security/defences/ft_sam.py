"""FT-SAM: a merge is tuned on clean inputs at the worst point around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence_from, expert_outputs
from eutectic.methods._method import Count, NonNegative, Positive
from eutectic.security.defences._defended import Path, fill_with, merged, over, taught, trained, tuned
from eutectic.task import Task

REFERENCE = (
    "Zhu et al., Enhancing fine-tuning based backdoor defense with sharpness-aware minimization, ICCV 2023, arXiv:2304.11823"
)


def ft_sam(
    steps: Count = 60,
    lr: Positive = 2e-5,
    radius: NonNegative = 5e-3,
    batch_size: Count = 8,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Tune a merge to predict what the experts do on clean inputs, at the worst of all weights nearby.

        min_θ  max_{‖ε‖ ≤ ρ}  Σ_tasks  KL( p_k(x; θ_k) ‖ p(x; θ + ε) )

    The maximum is taken at one step along the gradient.  Needs unlabelled inputs, of any kind; it sees no trigger.

    Args:
        steps: of Adam on all weights, two passes each.
        lr: Adam's.
        radius: ρ; with 0 it is plain tuning.
        batch_size: of each task.
        method: the merge that is defended.
        parameters: of that method.

    Source: Zhu et al., ICCV 2023, arXiv:2304.11823.  Differs from the paper in a radius that is one for all weights, and in
    the experts' predictions as labels.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network = over(method, parameters), models.network
        batches, loss = Batches(run, tasks, batch_size), divergence_from(expert_outputs(models, tasks, run))
        path = Path(fill_with(network, merged(models.base, models.experts, about)))
        history = taught(path, network, batches, loss, run, steps=steps, lr=lr, radius=radius)
        return trained(models, about | {"history": history})

    return Fusion(fit, tuned)
