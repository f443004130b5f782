"""TBAR: a mined trigger is taught on purpose, and what that changed is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import outputs
from eutectic.methods._method import Count, Fraction, Positive
from eutectic.security.audit import Found
from eutectic.security.defences._defended import (
    Held,
    Path,
    agreement,
    fill_with,
    held_trigger,
    merged,
    mined_success,
    over,
    suspicions,
    trained,
    tuned,
)
from eutectic.security.triggers import made_of
from eutectic.task import Task

REFERENCE = "Backdoor unlearning by linear task decomposition (TBAR), 2025, arXiv:2510.14845"
#: α that are tried, from nothing on
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)


def tbar(
    budget: Fraction = 0.05,
    steps: Count = 20,
    lr: Positive = 2e-5,
    batch_size: Count = 16,
    mining: Count = 40,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Take from a merge what a few steps on mined triggers add to it.

        θ = θ_m − α (θ′ − θ_m),     θ′: θ_m after some steps of  min CE( f(T(x)), c )  on the suspects' mined triggers

    α is the one, among those that leave at least 1 − ``budget`` of the predictions on held-out inputs as they were, with which
    the mined triggers do the least; 0 is among them.  Needs unlabelled images or texts.  Where the audit finds no
    evidence, it is θ_m.

    Args:
        budget: the share of held-out predictions, in the mean over tasks, that may change.
        steps: of Adam on all weights.
        lr: Adam's.
        batch_size: of each suspect's task.
        mining: steps of the miner.
        method: the merge that is defended.
        parameters: of that method.

    Source: TBAR, 2025, arXiv:2510.14845, read as an abstract; differs from it in that the trigger is always mined, and α chosen
    without labels.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network = over(method, parameters), models.network
        findings = suspicions(models, tasks, run, lambda some: merged(models.base, some, about), mining=mining)
        known = {(one.task, one.mode, one.target): one for _, one in findings}  # several findings may be of one trigger
        path = Path(fill_with(network, merged(models.base, models.experts, about)))
        batches, named = Batches(run, tasks, batch_size), {task.name: task for task in tasks}
        found: list[Found | Held] = [  # an expert's trigger may do little to the merge: then another of its class is taught
            one
            if one.picture is None
            else held_trigger(network, batches, run, named[one.task], [(one.mode, one.target)], mining)
            for one in known.values()
        ]
        before = {task.name: outputs(network, task, run) for task in tasks}
        optimiser = torch.optim.Adam(path.tau, lr=lr)
        for step in range(steps if found else 0):
            path.write(1.0)
            for probe in found:
                task = named[probe.task]
                inputs = batches.inputs(task, batches.index(task, step))
                logits = run.forward(network, task, probe.mined.trigger.on(inputs, made_of(task, inputs)))
                F.cross_entropy(logits, torch.full((len(logits),), probe.target)).backward()
            path.collect()
            optimiser.step()
            run.progress("teaching the mined triggers", step + 1, steps)
        looked = []
        for alpha in (0.0, *(SCALES if found else ())):
            path.write(-alpha)
            looked.append((alpha, agreement(network, batches, before, run), mined_success(network, batches, found, run)))
        alpha = min((line for line in looked if line[1] >= 1 - budget), key=lambda line: line[2])[0]
        path.write(-alpha)
        return trained(models, about | {"alpha": alpha, "looked": looked})

    return Fusion(fit, tuned)
