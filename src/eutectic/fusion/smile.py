"""SMILE: every linear layer keeps its experts as low-rank factors, and each token chooses among them; no data, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Overlay, Select
from eutectic.errors import LayoutError, ParameterError
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._routing import Description, linears, named
from eutectic.fusion._tensors import difference, names_of, spectrum
from eutectic.merge.compose import Joined
from eutectic.merge.view import Merged
from eutectic.methods._method import Count
from eutectic.methods._spectral import Svd
from eutectic.task import Task

REFERENCE = "Tang et al., SMILE: Zero-shot sparse mixture of low-rank experts construction, 2024, arXiv:2408.10174"


def smile(rank: Count = 32, gate_rank: Count = 16, top_k: Count = 1, rest: Literal["base", "average"] = "base") -> Fusion:
    """Keep the experts' strongest directions in every linear layer, and let each token choose by how long it is on them.

        y = W₀x + b₀ + Σᵢ pᵢ (Uᵢ Sᵢ Vᵢᵀ x + bᵢ − b₀),     Wᵢ − W₀ ≈ Uᵢ Sᵢ Vᵢᵀ
        pᵢ = softmax over the top_k of ‖Vᵢᵀ x‖, by the gate_rank strongest directions; 0 for the other experts

    Looks at no data; tasks may be left out.  Every token and layer chooses for itself.  LoRA experts that began with the same A
    have nearly the same Vᵢ, whose gate cannot tell them apart, however well the factors hold each of them.

    Args:
        rank: directions kept of each expert and matrix, at most; as many as the matrix has are lossless.
        gate_rank: directions by which tokens choose; fewer than the layer has inputs.
        top_k: experts that a token takes; with one, its weight is 1.
        rest: what is done with all that is no linear layer: the base's is kept, or the experts are averaged.

    A layer m × n with N experts grows by N (max(rank, gate_rank) n + rank m + m) numbers.  ``about`` of the artefact has the
    ranks that each layer really holds: no more than the matrix and the numerical rank of any expert's change, as for LoRA.

    Raises LayoutError for a network without a linear layer that any expert changed, or with layers of torch.nn that read
    weights past ``forward``; ParameterError for a gate of all directions, on which all tokens are equally long;
    NonFiniteError naming an expert and tensor.

    Source: Tang et al., 2024, arXiv:2408.10174, section 4.  Differs from the paper in that gate and experts share one product;
    that a layer of which only biases changed takes their mean, where the paper's keeps the base's; and that there are no dense
    experts.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        names, layers = names_of(models), linears(models.network)
        tensors, ranks, described = dict[str, Tensor](), dict[str, list[int]](), dict[str, Description]()
        for number, (path, layer) in enumerate(layers.items(), start=1):
            weight = names[id(layer.weight)][0]
            parts = [
                spectrum(models.base, name, expert, weight, max(rank, gate_rank)) for name, expert in models.experts.items()
            ]
            shift_N = None if layer.bias is None else _shifts(models, names[id(layer.bias)][0])
            run.progress("linear layers", number, len(layers))
            if not any(len(part.s) for part in parts) and (shift_N is None or not shift_N.any()):
                continue
            if len(parts) > 1 and any(len(part.s[:gate_rank]) == layer.in_features for part in parts):
                raise ParameterError(
                    f"gate_rank = {gate_rank} takes all {layer.in_features} directions of the inputs of {weight!r}, and over"
                    " all of them a token is equally long for every expert; take fewer",
                    ("gate_rank",),
                )
            right, left = factors(parts, rank)
            found = {"right": right, "left": left} | ({} if shift_N is None else {"shift": shift_N})
            tensors |= {named(path, key): tensor.to(models.base.spec(weight).dtype) for key, tensor in found.items()}
            ranks[path] = [len(part.s[:rank]) for part in parts]
            described[path] = {
                **{"kind": "low_rank", "experts": len(parts), "gate": gate_rank, "top": top_k},
                **{"directions": right.shape[1], "rank": left.shape[2]},
            }
        if not ranks:
            raise LayoutError(
                f"no expert differs from the base in any of {len(layers)} linear layers, so there is nothing to keep"
            )
        own = [names[id(p)] for layer in layers.values() for p in layer.parameters()]
        about = {"layers": described, "ranks": ranks, "linear": [name for group in own for name in group]}
        return Artefact(Memory(tensors), about)

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        if rest == "base":
            return Joined([base, artefact.tensors], base.origin)
        average = Merged("average", base, experts)
        kept = set(artefact.about["linear"])
        return Joined([Overlay(average, Select(base, kept.__contains__)), artefact.tensors], average.origin)

    return Fusion(fit, build, least_tasks=0)


def factors(parts: Sequence[Svd], rank: int) -> tuple[Tensor, Tensor]:
    """R ``[N, d, n]`` of the rows Vᵀ and L ``[m, N, r]`` of the columns U S of N decompositions, r ≤ ``rank``.

    d is the length of the longest; what others lack of it is zeros.
    """
    most = max(len(part.s) for part in parts)
    r = min(rank, most)
    right = torch.stack([F.pad(part.Vh, (0, 0, 0, most - len(part.s))) for part in parts])
    left = [part.U[:, :r] * part.s[:r] for part in parts]
    return right, torch.stack([F.pad(scaled, (0, r - scaled.shape[1])) for scaled in left], dim=1)


def _shifts(models: ModelSet, bias: str) -> Tensor:
    """bᵢ − b₀ ``[N, m]``.  Raises NonFiniteError naming the expert."""
    return torch.stack([difference(models.base, name, expert, bias) for name, expert in models.experts.items()])
