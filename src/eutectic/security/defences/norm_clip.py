"""Norm clipping: no expert moves further from the base than most do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eutectic.checkpoint.base import Memory
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._tensors import difference
from eutectic.methods._method import Positive
from eutectic.security.defences._defended import gated, over
from eutectic.task import Task

REFERENCE = "Sun et al., Can you really backdoor federated learning?, 2019, arXiv:1911.07963"


def norm_clip(most: Positive = 1.0, method: str = "task_arithmetic", parameters: dict[str, Any] | None = None) -> Fusion:
    """Merge experts whose task vectors are no longer than ``most`` times the median.

        θ = merge(θ₀, θ₀ + gₖ τₖ),     gₖ = min(1, most · median_j ‖τⱼ‖ / ‖τₖ‖)

    Needs no data.  It undoes backdoors that are amplified to survive a merge (LoBAM, Merge-Hijacking), and no others.

    Args:
        most: the longest, in medians.
        method: the merge that is defended.
        parameters: of that method.

    Source: Sun et al., 2019, arXiv:1911.07963, section 4.  Differs from the paper in that the bound is the experts' own median,
    and in no noise.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        squares = torch.zeros(len(models.experts), dtype=torch.float64)
        for name, spec in models.base.specs.items():
            if spec.dtype.is_floating_point:
                for at, (expert, weights) in enumerate(models.experts.items()):
                    squares[at] += float(difference(models.base, expert, weights, name).square().sum(dtype=torch.float64))
        norms = squares.sqrt()
        gates = (most * norms.median() / norms.clamp(min=1e-30)).clamp(max=1)
        return Artefact(Memory({"gates": gates}), over(method, parameters) | {"norms": norms.tolist()})

    return Fusion(fit, gated, least_tasks=0)
