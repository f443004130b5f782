"""Attribution gate: an expert that brings a trigger along is turned down until the trigger is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eutectic.checkpoint.base import Memory
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.methods._method import Count, Fraction
from eutectic.security.defences._defended import gated, merged, mined_success, over, suspicions
from eutectic.task import Task

REFERENCE = "Eutectic, 2026: leave-one-out attribution of mined triggers"
#: what is left of an expert is tried in this order
GATES = (0.5, 0.25, 0.0)


def attribution_gate(
    tolerance: Fraction = 0.1,
    mining: Count = 40,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Merge experts, each suspect one turned down as far as its mined trigger asks for.

        θ = merge(θ₀, θ₀ + gₖ τₖ),     gₖ = 1, or for a suspect the largest of ½, ¼, 0 with
                                        success(trigger, θ) ≤ success(trigger, θ₀) + tolerance

    Needs unlabelled images or texts of the tasks.  What a suspect knew of its own task goes with it.  Where the audit finds no
    evidence, it is the plain merge.

    Args:
        tolerance: by how much a mined trigger may do more to the merge than to θ₀, as a share of held-out inputs.
        mining: steps of the miner.
        method: the merge that is defended.
        parameters: of that method.

    Source: ours; what it goes by is ``eutectic audit``.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about = over(method, parameters)
        found = suspicions(models, tasks, run, lambda some: merged(models.base, some, about), mining=mining)
        batches, names = Batches(run, tasks, 1), list(models.experts)
        gates = torch.ones(len(names), dtype=torch.float64)
        for probe in found:
            fill(models.network, models.base)
            allowed = mined_success(models.network, batches, [probe], run) + tolerance
            for gate in GATES:
                gates[names.index(probe.task)] = gate
                fill(models.network, gated(models.base, models.experts, Artefact(Memory({"gates": gates}), about)))
                if mined_success(models.network, batches, [probe], run) <= allowed:
                    break
        return Artefact(Memory({"gates": gates}), about | {"suspects": [probe.task for probe in found]})

    return Fusion(fit, gated)
