"""WAG: several models of the same task are averaged before anything else is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.security.defences._defended import over
from eutectic.security.defences._groups import grouped, mean, together
from eutectic.task import Task

REFERENCE = (
    "Arora et al., Here's a free lunch: sanitizing backdoored models with model merge, ACL 2024 Findings, arXiv:2402.19334"
)


def wag(
    groups: dict[str, list[str]] | None = None,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Average experts of the same task, then merge those averages.

        θ = merge(θ₀, mean_{k in G₁} θₖ, mean_{k in G₂} θₖ, …)

    Needs no data.  A backdoor that one of N experts of a task has is diluted N times more than what all have learned; one that
    several share is not, and one that was made to survive a merge (BadMerging) may not be.

    Args:
        groups: a name → the experts of the same task; experts in no group stay as they are.  All are one group by default.
        method: how the averages are merged; of a single group there is nothing to merge, and its average is the result.
        parameters: of that method.

    Raises:
        ParameterError: an expert of a group that there is not, or that is in two.

    Source: Arora et al., ACL 2024 Findings, arXiv:2402.19334, the average of homologous models of one task.  Differs from the
    paper in that such averages can be merged further.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        grouped(models.experts, groups)
        return Artefact(Memory({}), over(method, parameters) | {"groups": groups})

    return Fusion(fit, averaged, least_tasks=0)


def averaged(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
    """The merge of each group's average."""
    means = {group: mean(some) for group, some in grouped(experts, artefact.about["groups"]).items()}
    return together(base, means, artefact.about)
