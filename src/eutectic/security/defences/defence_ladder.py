"""Defence ladder (``defend: auto``): defences are tried, the cheapest first, until one is good enough."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.errors import ParameterError, did_you_mean
from eutectic.fusion._api import method as fusion_of
from eutectic.fusion._fit import Batches
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import expert_outputs, fill
from eutectic.methods._method import Count, Fraction
from eutectic.registry import defences
from eutectic.security.defences._defended import agreement, chosen, held_triggers, merged, mined_success, over
from eutectic.task import Task

REFERENCE = "Eutectic, 2026"
#: from the cheapest to the dearest
RUNGS = ("norm_clip", "attribution_gate", "lfpm")


def defence_ladder(
    rungs: list[str] | None = None,
    most: Fraction = 0.05,
    budget: Fraction = 0.03,
    modes: list[str] | None = None,
    mining: Count = 24,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Try defences of a merge in turn, and take the first that holds: ``defend: auto`` in a recipe.

    A rung holds if triggers that were mined against the undefended merge take at most ``most`` of held-out inputs, and if its
    predictions agree with the experts' at least as often as the merge's do, less ``budget``.  The first rung is to do nothing.
    If none holds, it is the one with the least success among those within the budget, and the artefact says so: ``held`` is
    false.  Needs unlabelled images.  Each rung that was tried is in the artefact, with its numbers.

    Args:
        rungs: defences, in their order; by default norm_clip, attribution_gate, lfpm.
        most: how much of held-out inputs the worst mined trigger may take.
        budget: how much of the agreement with the experts may be lost.
        modes: of the triggers that rungs are judged by, centre by default: none that defences learn on.
        mining: steps of the miner.
        method: the merge that is defended.
        parameters: of that method.

    Raises:
        ParameterError: a rung that is no defence, or is this one.

    Source: ours.
    """
    names = list(RUNGS if rungs is None else rungs)
    known = [name for name in defences() if name != "defence_ladder"]
    for name in names:
        if name not in known:
            raise ParameterError(f"rungs: {name!r} is no defence.{did_you_mean(name, known)}", ("rungs",))

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        about, network = over(method, parameters), copy.deepcopy(models.network)
        batches, teacher = Batches(run, tasks, 1), expert_outputs(models, tasks, run)
        fill(network, merged(models.base, models.experts, about))
        held = [one for mode in modes or ["centre"] for one in held_triggers(network, batches, run, mode, mining)]
        tried: list[dict[str, Any]] = []
        made: list[Artefact] = []

        def look(name: str, artefact: Artefact) -> bool:
            fill(network, laid(models.base, models.experts, about, name, artefact))
            found = {"rung": name, "agreement": agreement(network, batches, teacher, run)}
            found["success"] = mined_success(network, batches, held, run)
            tried.append(found)
            made.append(artefact)
            return found["success"] <= most and found["agreement"] >= tried[0]["agreement"] - budget

        holds = look("none", Artefact(Memory({}), {}))
        for number, name in enumerate(names):
            if holds:
                break
            run.progress(name, number, len(names))
            holds = look(name, fusion_of(name, about["over"]).fit(models, tasks, run))
        at = chosen([(at, line["agreement"], line["success"]) for at, line in enumerate(tried)], most, budget)
        facts = {**made[at].about, **about, "rung": tried[at]["rung"], "held": holds, "tried": tried}
        return Artefact(made[at].tensors, facts)

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        return laid(base, experts, artefact.about, artefact.about["rung"], artefact)

    return Fusion(fit, build)


def laid(
    base: Checkpoint, experts: Mapping[str, Checkpoint], about: Mapping[str, Any], name: str, artefact: Artefact
) -> Checkpoint:
    """What a rung makes of the merge."""
    if name == "none":
        return merged(base, experts, about)
    return fusion_of(name, about["over"]).build(base, experts, artefact)
