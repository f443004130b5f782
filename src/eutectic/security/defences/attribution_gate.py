"""Attribution gate: an expert that brings a trigger along is turned down until the trigger is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eutectic.checkpoint.base import Memory
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.methods._method import Count, Fraction
from eutectic.security.audit import Found
from eutectic.security.defences._defended import gated, held_trigger, merged, mined_success, over, suspicions
from eutectic.task import Task

REFERENCE = "Eutectic, 2026: leave-one-out attribution of mined triggers"
#: what is left of an expert is tried in this order, before nothing
GATES = (0.5, 0.25)


def attribution_gate(
    tolerance: Fraction = 0.1,
    mining: Count = 40,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Merge experts, each suspect one turned down as far as its mined trigger asks for.

        θ = merge(θ₀, θ₀ + gₖ τₖ),     gₖ = 1, or for a suspect the largest of ½, ¼, 0 with
                                        success(trigger, θ) ≤ success(trigger, θ₀) + tolerance
                                        weakness(θ) ≤ weakness(θ without suspects) + tolerance

    Weakness is what a trigger of the suspect's class does to held-out inputs: the audit's own, or of images one that is mined
    anew on θ, if that does more.

    Needs unlabelled images or texts of the tasks.  What a suspect knew of its own task goes with it.  Where the audit finds no
    evidence, it is the plain merge.

    Args:
        tolerance: by how much more a mined trigger may do, as a share of held-out inputs.
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
        named, numbers = {task.name: task for task in tasks}, {name: names.index(name) for name, _ in found}

        def does(probe: Found) -> float:
            return mined_success(models.network, batches, [probe], run)

        def refill() -> None:
            fill(models.network, gated(models.base, models.experts, Artefact(Memory({"gates": gates}), about)))

        def weak(probe: Found) -> float:
            return weakness(models.network, batches, run, named[probe.task], probe, mining)

        fill(models.network, models.base)
        at_base = [does(probe) for _, probe in found]
        gates[list(numbers.values())] = 0.0  # without all suspects: two may have the same backdoor
        refill()
        bounds = list(zip(found, at_base, [weak(probe) for _, probe in found], strict=True))
        for suspect, number in numbers.items():
            own = [(probe, base + tolerance, without + tolerance) for (name, probe), base, without in bounds if name == suspect]
            for gate in (*GATES, 0.0):
                gates[number] = gate
                refill()
                if gate == 0 or all(does(probe) <= base and weak(probe) <= without for probe, base, without in own):
                    break
        return Artefact(Memory({"gates": gates}), about | {"suspects": list(numbers)})

    return Fusion(fit, gated)


def weakness(network: nn.Module, batches: Batches, run: Run, task: Task, probe: Found, steps: int) -> float:
    """What a trigger of a probe's class does to held-out inputs: the probe's, or one mined on the network if that does more."""
    found = mined_success(network, batches, [probe], run)
    if probe.picture is None:  # mining tokens anew would try most of the same
        return found
    again = held_trigger(network, batches, run, task, [(probe.mode, probe.target)], steps)
    return max(found, mined_success(network, batches, [again], run))
