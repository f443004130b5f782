"""LoraHub: one weight for each expert, found without gradients from a few labelled samples of the tasks to be done."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.publish import whole
from eutectic.errors import MissingDependencyError, NonFiniteError
from eutectic.fusion._coefficients import equation_over, facts, weighted
from eutectic.fusion._fit import generator, rank
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.methods._method import Count, NonNegative, Positive
from eutectic.task import Task

REFERENCE = (
    "Huang et al., LoraHub: efficient cross-task generalization via dynamic LoRA composition, COLM 2024, arXiv:2307.13269; "
    "Hansen, The CMA evolution strategy: a tutorial, 2016, arXiv:1604.00772"
)
#: what is looked at, with its labels: no expert has learned it, and no score is of it
SPLIT = "val"
#: where weights begin to vary, in units of their bound
SIGMA = 1 / 3
#: what counts as the loss of weights whose loss is not finite: more than of any other
WORST = 1e9


def lorahub(generations: Count = 10, shots: Count = 16, bound: Positive = 1.5, penalty: NonNegative = 0.05) -> Fusion:
    """Weigh the task vectors so that a few labelled samples are predicted best; no gradient is taken.

        θ = θ₀ + Σₖ wₖ τₖ        min_w  mean over tasks of  CE(θ)  +  penalty · mean |wₖ|,    |wₖ| ≤ bound

    CMA-ES begins at w = 0, the base, with a population of 4 + ⌊3 ln K⌋ in each generation; the best w that was tried is kept.
    Tasks need no expert of their own: with one task that no expert knows it is LoraHub as it was meant.  It needs the extra
    ``lorahub``.

    Args:
        generations: how many populations are tried.
        shots: labelled samples of each task, at most, from its split ``val``; never from ``test``.
        bound: of each weight.
        penalty: of large weights.

    Raises MissingDependencyError without cma, TaskError for a task without ``val``, NonFiniteError naming a task whose loss
    under the base is not finite.

    Source: Huang et al., COLM 2024, arXiv:2307.13269, section 3.  Differs from the paper in that what is added is products of
    adapters' factors, not their factors (see docs/adapters.md), so experts may be adapters or full; in the search, which is
    CMA-ES as Nevergrad's NGOpt is a choice among such; and in that the penalty is on the mean of |w|.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        cma = _cma()
        equation = equation_over("task_arithmetic", None, models, run)
        k, sites = equation.shape
        seen = [_Shots(task, shots, run) for task in tasks]

        def loss(weights: np.ndarray) -> float:
            equation.write(torch.from_numpy(weights[:k])[:, None].expand(k, sites))
            value = sum(one.loss(models.network, run) for one in seen) / len(seen) + penalty * float(np.abs(weights[:k]).mean())
            return value if math.isfinite(value) else WORST

        random = np.random.default_rng(run.seed)
        search = cma.CMAEvolutionStrategy(
            np.zeros(max(2, k)),  # it knows no single dimension: a second one is idle
            SIGMA * bound,
            # with a ``randn`` of our own no global generator is touched, and nothing depends on ``seed``
            {"bounds": [-bound, bound], "seed": math.nan, "randn": lambda *shape: random.standard_normal(shape)}
            | {"verbose": -9, "verb_log": 0, "verb_disp": 0},
        )
        known = _Losses(run.folder)
        equation.write(torch.zeros(k, sites, dtype=torch.float64))
        for one in seen:
            one.require_finite(models.network, run)
        best = np.zeros(max(2, k))
        least = known.of(lambda: loss(best))
        history: list[tuple[int, float, None]] = [(0, least, None)]
        for generation in range(1, generations + 1):
            tried = search.ask()
            values = [known.of(lambda w=w: loss(w)) for w in tried]
            known.keep()
            search.tell(tried, values)
            if min(values) < least:
                least, best = min(values), tried[int(np.argmin(values))]
            history.append((generation, least, None))
            run.progress("weights", generation, generations)
        weights = torch.from_numpy(np.asarray(best)[:k])[:, None].expand(k, sites)
        said = {"history": history, "notes": f"weights fitted to {shots} labelled samples of each task's {SPLIT}, at most"}
        return Artefact(Memory({"weights": weights.float()}), facts(equation, "task_arithmetic", None) | said)

    return Fusion(fit, weighted, labelled=SPLIT)


class _Shots:
    """A few labelled samples of a task, drawn without replacement."""

    def __init__(self, task: Task, shots: int, run: Run) -> None:
        arrays = task.arrays(SPLIT)
        order = torch.randperm(len(arrays), generator=generator(run.seed, task.name, "shots"))
        self.task = task
        self.inputs, self.labels = arrays.take(order[:shots])

    @torch.no_grad()
    def loss(self, network: torch.nn.Module, run: Run) -> float:
        """The mean cross-entropy."""
        return F.cross_entropy(run.forward(network, self.task, self.inputs), self.labels.to(run.device)).item()

    def require_finite(self, network: torch.nn.Module, run: Run) -> None:
        """Raises NonFiniteError."""
        if not math.isfinite(value := self.loss(network, run)):
            raise NonFiniteError(f"task {self.task.name!r}: the loss is {value} already under the base")


class _Losses:
    """The losses that were taken, in order: a search that was interrupted asks for the same weights again."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / "losses.json"
        there = self._path is not None and self._path.exists()
        self._taken: list[float] = json.loads(self._path.read_text(encoding="utf-8")) if self._path and there else []
        self._known: Iterator[float] = iter(list(self._taken))

    def of(self, take: Callable[[], float]) -> float:
        """The next one, taken if it is not known."""
        found = next(self._known, None)
        if found is None:
            found = take()
            self._taken.append(found)
        return found

    def keep(self) -> None:
        """Write them down, whole or not at all."""
        if self._path is None or rank():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self._path) as partial:
            partial.write_text(json.dumps(self._taken), encoding="utf-8")


def _cma() -> Any:
    try:
        with warnings.catch_warnings():  # that without matplotlib it draws no plots
            warnings.simplefilter("ignore", UserWarning)
            import cma
    except ImportError:
        raise MissingDependencyError("lorahub needs cma: pip install 'eutectic[lorahub]'") from None
    return cma
