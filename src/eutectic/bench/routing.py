"""Which experts a mixture uses: the coefficients of its routed layers, by task, as numbers and as a heat map."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eutectic.errors import LayoutError
from eutectic.fusion._routing import Gate, gates
from eutectic.task import Task

_CELL, _LEFT, _TOP = 12, 300, 60


class Routing(NamedTuple):
    """``mean`` ``[tasks, layers, N]`` of the coefficients, over tokens or samples, and ``entropy`` ``[tasks, layers]``.

    The entropy, in nats, is of that mean's share of the experts |c| / Σ|c|: 0 if a task's inputs all use one expert, ln N if
    they use all alike.
    """

    tasks: list[str]
    layers: list[str]
    mean: Tensor
    entropy: Tensor

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data, one entry a task and layer."""
        return {
            task: {
                layer: {"mean": self.mean[t, at].tolist(), "entropy": self.entropy[t, at].item()}
                for at, layer in enumerate(self.layers)
            }
            for t, task in enumerate(self.tasks)
        }


@torch.no_grad()
def routing(network: nn.Module, tasks: Sequence[Task], split: str = "test", batch_size: int = 64, most: int = 256) -> Routing:
    """The coefficients that each task's first ``most`` inputs have in each layer that chooses.

    Raises LayoutError for a network without routed layers, TaskError for a split that is missing.
    """
    found, sums = gates(network), dict[str, Tensor]()
    if not found:
        raise LayoutError("the network has no routed layers, so there is no routing to report")

    def note(name: str, gate: Gate, args: tuple[Tensor, ...]) -> None:
        c = gate.choice(args[0]).flatten(0, -2).double().cpu()
        sums[name] = sums.get(name, 0) + torch.cat([c.sum(0), torch.tensor([float(len(c))])])

    hooks = [
        gate.register_forward_hook(lambda module, args, output, name=name: note(name, module, args))
        for name, gate in found.items()
    ]
    means = []
    try:
        for task in tasks:
            sums.clear()
            for number, (inputs, _) in enumerate(task.batches(split, batch_size)):
                if number * batch_size >= most:
                    break
                network(inputs)
            means.append(torch.stack([sums[name][:-1] / sums[name][-1] for name in found]))
    finally:
        for hook in hooks:
            hook.remove()
    mean = torch.stack(means)
    share = mean.abs() / mean.abs().sum(-1, keepdim=True).clamp(min=1e-12)
    return Routing([task.name for task in tasks], list(found), mean, torch.special.entr(share).sum(-1))


def heat_map(found: Routing, experts: Sequence[str]) -> str:
    """An SVG: a row a layer, a column an expert within a task; white is 0, blue the largest coefficient, red negative ones."""
    tasks, layers, n = found.mean.shape
    top = float(found.mean.abs().max()) or 1.0
    width, height = _LEFT + tasks * (n * _CELL + 6) + 10, _TOP + layers * _CELL + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="9">'
    ]
    for t, task in enumerate(found.tasks):
        left = _LEFT + t * (n * _CELL + 6)
        parts.append(f'<text x="{left}" y="{_TOP - 44}">{html.escape(task)}</text>')
        parts += [
            f'<text transform="translate({left + i * _CELL + 9},{_TOP - 3}) rotate(-60)" font-size="7">'
            f"{html.escape(name[:10])}</text>"
            for i, name in enumerate(experts)
        ]
        for at in range(layers):
            for i in range(n):
                value = float(found.mean[t, at, i])
                shade = round(255 * (1 - min(abs(value) / top, 1)))
                colour = f"rgb({shade},{shade},255)" if value >= 0 else f"rgb(255,{shade},{shade})"
                said = html.escape(f"{task}, {found.layers[at]}, {experts[i]}: {value:.3f}")
                parts.append(
                    f'<rect x="{left + i * _CELL}" y="{_TOP + at * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" '
                    f'fill="{colour}"><title>{said}</title></rect>'
                )
    parts += [
        f'<text x="{_LEFT - 6}" y="{_TOP + at * _CELL + 9}" text-anchor="end">{html.escape(layer[-52:])}</text>'
        for at, layer in enumerate(found.layers)
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"
