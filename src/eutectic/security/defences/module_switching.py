"""Module switching: of several models of the same task each module is taken from one, so that no shortcut stays whole."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Overlay, Select
from eutectic.fusion._fit import generator
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.methods._method import Count
from eutectic.security.defences._defended import over
from eutectic.security.defences._groups import grouped, mean, together
from eutectic.task import Task

REFERENCE = "Li et al., Defending against backdoor attacks via module switching, ICLR 2026, arXiv:2504.05902"


class Module(NamedTuple):
    """A matrix with its bias: the layer it is in, what it is called there, and its tensors."""

    layer: int
    kind: str
    tensors: tuple[str, ...]


def module_switching(
    moves: Count = 4000,
    groups: dict[str, list[str]] | None = None,
    method: str = "task_arithmetic",
    parameters: dict[str, Any] | None = None,
) -> Fusion:
    """Take each module from one of the experts of the same task, neighbours from different ones, and all else from their mean.

        s: module → expert,     max_s  − Σ_neighbours [s = s′] − Σ_same kind, layers k < l  2^{k−l} [s = s′] − imbalance + D

    Neighbours are those of a layer in the order of their names, and the last and first of layers that follow each other; D is
    the number of layers that no other equals.  A backdoor that lies in how modules work together is cut, whichever expert has
    it.  Needs no data.

    Args:
        moves: of the search: a module's expert is changed, and changed back if that was worse.
        groups: a name → the experts of the same task; experts in no group stay as they are.  All are one group by default.
        method: how what comes of the groups is merged; of a single group there is nothing to merge.
        parameters: of that method.

    Raises:
        ParameterError: an expert of a group that there is not, or that is in two.

    Source: Li et al., ICLR 2026, arXiv:2504.05902.  Differs from the paper in that neighbours follow from names, in a climb
    from alternating experts in the place of evolution, and in that candidates are not chosen by data.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        modules = modules_of(models.base)
        sources = {
            group: switched(modules, len(some), moves, run.seed) if len(some) > 1 else []
            for group, some in grouped(models.experts, groups).items()
        }
        return Artefact(Memory({}), over(method, parameters) | {"groups": groups, "sources": sources})

    return Fusion(fit, assembled, least_tasks=0)


def modules_of(base: Checkpoint) -> list[Module]:
    """The modules of numbered layers that have a matrix, in the order of the layout's layers and names."""
    found: dict[tuple[int, str], list[str]] = {}
    for name in base.specs:
        parts = re.fullmatch(r"(.*?)\.(\d+)\.(.+)\.\w+", name)
        if parts:
            found.setdefault((int(parts[2]), f"{parts[1]}.{parts[3]}"), []).append(name)
    kept = [Module(*key, tuple(names)) for key, names in found.items() if any(len(base.spec(n).shape) > 1 for n in names)]
    return sorted(kept, key=lambda module: module.layer)


def fitness(modules: Sequence[Module], sources: Sequence[int], experts: int) -> float:
    """How well an assignment ``[modules]`` of experts keeps apart what belongs together; larger is better."""
    alike = float(sum(a == b for a, b in itertools.pairwise(sources)))
    layers: dict[int, list[tuple[str, int]]] = {}
    kinds: dict[str, list[tuple[int, int]]] = {}
    for module, source in zip(modules, sources, strict=True):
        layers.setdefault(module.layer, []).append((module.kind, source))
        kinds.setdefault(module.kind, []).append((module.layer, source))
    for same in kinds.values():
        alike += sum(2.0 ** (k - n) for (k, a), (n, b) in itertools.combinations(same, 2) if a == b)
    counts = [list(sources).count(expert) for expert in range(experts)]
    imbalance = sum(abs(count - len(modules) / experts) for count in counts)
    return len({tuple(layer) for layer in layers.values()}) - alike - imbalance


def switched(modules: Sequence[Module], experts: int, moves: int, seed: int) -> list[int]:
    """The best assignment ``[modules]`` of that many moves, from experts in turn on."""
    sources = [(place + module.layer) % experts for place, module in enumerate(modules)]
    if not modules:
        return sources
    best, noise = fitness(modules, sources, experts), generator(seed, "module_switching")
    places = torch.randint(len(modules), (moves,), generator=noise).tolist()
    shifts = torch.randint(1, experts, (moves,), generator=noise).tolist() if experts > 1 else [0] * moves
    for place, shift in zip(places, shifts, strict=True):
        before = sources[place]
        sources[place] = (before + shift) % experts
        value = fitness(modules, sources, experts)
        if value < best:
            sources[place] = before
        best = max(best, value)
    return sources


def assembled(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
    """The merge of what the groups' modules make."""
    modules, made = modules_of(base), dict[str, Checkpoint]()
    for group, some in grouped(experts, artefact.about["groups"]).items():
        made[group] = mean(some)
        for number, expert in enumerate(some.values() if len(some) > 1 else []):
            pairs = zip(modules, artefact.about["sources"][group], strict=True)
            own = {name for module, source in pairs if source == number for name in module.tensors}
            made[group] = Overlay(made[group], Select(expert, own.__contains__))
    return together(base, made, artefact.about)
