"""What task vectors are to each other: their cosines, and how far two of them disturb each other in what the network predicts.

A cosine is of all the weights that the base and the experts have; of adapters, of the products s B A, so it does not depend on
how a change is split into factors, and A's that never move count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eutectic import record
from eutectic.bench.evaluate import Progress
from eutectic.bench.suite import Suite
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.errors import EutecticError, LayoutError, TaskError
from eutectic.fusion._folder import filled
from eutectic.fusion._tensors import differences
from eutectic.merge.api import state_dict
from eutectic.merge.view import Merged
from eutectic.record import Record, wilson

#: between two tasks' names in a record of both
BETWEEN = ", "
#: λ₁ and λ₂ of the grid, and on how many inputs of each task it is measured
LAMBDAS = tuple(np.linspace(-2, 2, 9).tolist())
SAMPLES = 64
COSINE, ERROR = "cosine", "disentanglement error"


def cosines(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Tensor:
    """The cosines ``[K, K]`` of the task vectors, in float64; tensors are read one by one.

    Raises LayoutError naming an expert that is the base, NonFiniteError.
    """
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name, spec in base.specs.items():
        if spec.dtype.is_floating_point:
            vectors_K = differences(base, experts, name).flatten(1).double()
            gram += vectors_K @ vectors_K.T
    for expert, square in zip(experts, gram.diag().tolist(), strict=True):
        if square == 0:
            raise LayoutError(f"expert {expert!r} has the base's weights, so its task vector has no direction")
    lengths = gram.diag().sqrt()
    return gram / lengths / lengths[:, None]


@torch.no_grad()
def disentanglement(
    suite: Suite,
    tasks: Sequence[str],
    lambdas: Sequence[float] = LAMBDAS,
    samples: int = SAMPLES,
    progress: Progress = lambda line: None,
) -> tuple[Tensor, Tensor]:
    """How many predictions of a task's network change as another's task vector is added ``[2, G, G]``, of how many ``[2]``.

        ξ(λ₁, λ₂) = Σᵢ P_{x ∼ Dᵢ} [ f(x; θ₀ + λᵢ τᵢ)  ≠  f(x; θ₀ + λ₁ τ₁ + λ₂ τ₂) ]

    Entry i counts the first ``samples`` inputs of ``adapt`` of task i, under its own head; labels play no part.  Rows are λ₁,
    columns λ₂.  The network is the suite's, so of linearised experts it is the tangent.
    Raises TaskError unless there are two tasks.

    Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827, equation 7.
    """
    if len(set(tasks)) != 2 or len(tasks) != 2:
        raise TaskError(f"disentanglement is of two tasks, not of {', '.join(tasks) or 'none'}")
    base = Memory(state_dict(suite.base))
    experts = {name: Memory(state_dict(suite.expert(name))) for name in tasks}
    known, network = [suite.task(name) for name in tasks], suite.backbone()
    inputs = [task.arrays("adapt").take(torch.arange(min(samples, len(task.arrays("adapt")))))[0] for task in known]

    def predictions(first: float, second: float) -> list[Tensor]:
        filled(network, Merged("task_arithmetic", base, experts, {"scale": 1.0, "weights": [first, second]}))
        return [task.head(network(x)).argmax(1) for task, x in zip(known, inputs, strict=True)]

    alone = [predictions(one, 0.0)[0] for one in lambdas], [predictions(0.0, one)[1] for one in lambdas]
    changed = torch.zeros(2, len(lambdas), len(lambdas), dtype=torch.long)
    for row, first in enumerate(lambdas):
        progress(f"{ERROR}: row {row + 1} of {len(lambdas)}")
        for column, second in enumerate(lambdas):
            found = predictions(first, second)
            for i, at in ((0, row), (1, column)):
                changed[i, row, column] = (found[i] != alone[i][at]).sum()
    return changed, torch.tensor([len(one) for one in inputs])


def vectors(
    suite: Suite,
    pairs: Sequence[Sequence[str]] = (),
    lambdas: Sequence[float] = LAMBDAS,
    samples: int = SAMPLES,
    progress: Progress = lambda line: None,
) -> Iterator[Record]:
    """A record for the cosine of every two of the task vectors that are there, and for each point of the grids of some pairs.

    A cosine is exact, so its bounds are its value; those of an error are of 95 %, from Wilson's of either task.
    """
    names, about = suite.there, {"suite": suite.name, "versions": record.versions()}
    progress("cosines of task vectors")
    found = cosines(suite.base, suite.experts(names))
    for i, first in enumerate(names):
        for j, second in enumerate(names[i + 1 :], start=i + 1):
            value = found[i, j].item()
            inputs = {name: suite.fingerprints[name] for name in ("base", first, second)}
            yield Record(
                method="individual",
                task=BETWEEN.join((first, second)),
                metric=COSINE,
                n=1,
                value=value,
                low=value,
                high=value,
                split="",
                inputs=inputs,
                **about,
            )
    for pair in pairs:
        changed, n = disentanglement(suite, pair, lambdas, samples, progress)
        inputs = {name: suite.fingerprints[name] for name in ("base", *pair)}
        for row, first_scale in enumerate(lambdas):
            for column, second_scale in enumerate(lambdas):
                yield Record(
                    method="task_arithmetic",
                    task=BETWEEN.join(pair),
                    metric=ERROR,
                    n=int(n.sum()),
                    split="adapt",
                    parameters={"scale": 1.0, "weights": [first_scale, second_scale]},
                    inputs=inputs,
                    **_bounded(changed[:, row, column].tolist(), n.tolist()),
                    **about,
                )


def _bounded(hits: Sequence[int], n: Sequence[int]) -> dict[str, Any]:
    """The sum of proportions; its half width is the root of the squares of theirs."""
    value = sum(h / size for h, size in zip(hits, n, strict=True))
    halves = [(high - low) / 2 for low, high in (wilson(h, size) for h, size in zip(hits, n, strict=True))]
    half = sum(one * one for one in halves) ** 0.5
    return {"value": value, "low": max(0.0, value - half), "high": min(float(len(n)), value + half)}


def summary(records: Sequence[Record]) -> list[str]:
    """A line for each kind of number: the mean and extremes of cosines; ξ where both scales are 1, and its mean."""
    lines = []
    cosine = [one.value for one in records if one.metric == COSINE]
    if cosine:
        extremes = f"{min(cosine):.3f} to {max(cosine):.3f}"
        lines.append(f"cosines of {len(cosine)} pair(s) of task vectors: mean {np.mean(cosine):.3f}, {extremes}")
    for pair, those in _grids(records).items():
        at_one = next((one for one in those if one.parameters["weights"] == [1.0, 1.0]), None)
        said = f"; at λ = (1, 1) {at_one.value:.3f} [{at_one.low:.3f}, {at_one.high:.3f}]" if at_one else ""
        lines.append(f"{ERROR} of {pair}: mean {np.mean([one.value for one in those]):.3f} of 2{said}")
    return lines


def _grids(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for one in records:
        if one.metric == ERROR:
            found.setdefault(one.task, []).append(one)
    return found


def plot(records: Sequence[Record], path: Path, drawn: Any) -> None:
    """Draw the matrix of cosines, and the map of errors of each pair, into an empty figure, and write it as an SVG.

    Raises EutecticError for records that have neither.
    """
    from matplotlib import rc_context

    grids = _grids(records)
    pairs = {tuple(one.task.split(BETWEEN)): one.value for one in records if one.metric == COSINE}
    panels = len(grids) + bool(pairs)
    if not panels:
        raise EutecticError("the records have neither cosines nor disentanglement errors")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vectors", "font.size": 8, "image.cmap": "viridis"}):
        drawn.set_size_inches(4.0 * panels, 3.6)
        axes = iter(np.ravel(drawn.subplots(1, panels)))
        if pairs:
            names = list(dict.fromkeys(name for pair in pairs for name in pair))
            matrix = np.eye(len(names))
            for (first, second), value in pairs.items():
                i, j = names.index(first), names.index(second)
                matrix[i, j] = matrix[j, i] = value
            image = _image(
                drawn,
                next(axes),
                matrix,
                "cosines of task vectors",
                names,
                names,
                min(0.0, *pairs.values()),
                max(0.5, *pairs.values()),
            )
            image.set_xticklabels(names, rotation=90)
        for pair, those in grids.items():
            first, second = (sorted({one.parameters["weights"][at] for one in those}) for at in (0, 1))
            field = np.zeros((len(first), len(second)))
            for one in those:
                x, y = one.parameters["weights"]
                field[first.index(x), second.index(y)] = one.value
            shown = next(axes)
            said = [[f"{value:g}" for value in scales] for scales in (first, second)]
            _image(drawn, shown, field, ERROR, said[0], said[1], 0.0, 2.0)
            one, two = pair.split(BETWEEN)
            shown.set(ylabel=f"λ of {one}", xlabel=f"λ of {two}")
        drawn.savefig(path, format="svg", metadata={"Date": None})


def _image(drawn: Any, axes: Any, field: np.ndarray, title: str, rows: Any, columns: Any, low: float, high: float) -> Any:
    shown = axes.imshow(field, vmin=low, vmax=high)
    axes.set(title=title, yticks=range(len(rows)), yticklabels=rows, xticks=range(len(columns)), xticklabels=columns)
    drawn.colorbar(shown, ax=axes, shrink=0.8)
    return axes
