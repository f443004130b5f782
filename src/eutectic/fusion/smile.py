"""SMILE: every linear layer keeps its experts as low-rank factors, and each token chooses among them; no data, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Overlay, Select
from eutectic.errors import LayoutError
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._lowrank import Factors, Layer, most_directions
from eutectic.fusion._routing import Description, Turned, linears, named
from eutectic.fusion._tensors import names_of
from eutectic.merge.compose import Joined
from eutectic.merge.view import Merged
from eutectic.methods._method import Count
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
        gate_rank: directions by which tokens choose; at most one fewer than the layer has inputs, over all of which every
            token is equally long.
        top_k: experts that a token takes; with one, its weight is 1.
        rest: what is done with all that is no linear layer: the base's is kept, or the experts are averaged.

    A layer m × n with N experts grows by N (max(rank, gate_rank) n + rank m + m) numbers.  ``layers`` of the artefact has the
    sizes that each really gets: no more than the matrix has, or than the experts' adapters if they are such.  An adapter's
    factors are exact; of another expert's change they leave at most 1 % more than the best of their rank (see ``sketched``).
    An expert that left a layer as it was is never chosen there.

    Raises LayoutError for a network without a linear layer that any expert changed, or with layers of torch.nn that read
    weights past ``forward``.  Reading what is built raises NonFiniteError naming an expert and tensor.

    Source: Tang et al., 2024, arXiv:2408.10174, section 4.  Differs from the paper in that gate and experts share one product;
    that a layer of which only biases changed takes their mean, where the paper's keeps the base's; and that there are no dense
    experts.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        base, experts = models.base, models.experts
        names, layers = names_of(models), linears(models.network)
        sizes, own = dict[str, Description](), dict[str, list[list[str]]]()
        for number, (layer, linear) in enumerate(layers.items(), start=1):
            run.progress("linear layers", number, len(layers))
            groups = [names[id(p)] for p in linear.parameters()]
            weight, *bias = (group[0] for group in groups)
            most = max(most_directions(base, expert, weight) for expert in experts.values())
            if not most and all(
                torch.equal(base.read(name), expert.read(name)) for name in bias for expert in experts.values()
            ):
                continue
            own[layer] = groups
            sizes[layer] = {
                **{"kind": "low_rank", "experts": len(experts), "top": top_k, "gate": min(gate_rank, linear.in_features - 1)},
                **{
                    "directions": min(max(rank, gate_rank), most),
                    "rank": min(rank, most),
                    "turned": isinstance(linear, Turned),
                },
            }
        if not sizes:
            raise LayoutError(
                f"no expert differs from the base in any of {len(layers)} linear layers, so there is nothing to keep"
            )
        return Artefact(Memory({}), {"layers": sizes, "own": own})

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        sizes, layers, kept = artefact.about["layers"], dict[str, Layer](), set[str]()
        for layer, groups in artefact.about["own"].items():
            weight, bias = (*(group[0] for group in groups), None)[:2]
            layers[named(layer, "")] = Layer(weight, bias, *(sizes[layer][key] for key in ("directions", "rank", "turned")))
            kept.update(name for group in groups for name in group)
        below = base
        if rest == "average":
            below = Overlay(Merged("average", base, experts), Select(base, kept.__contains__))
        return Joined([below, Factors(base, experts, layers)], below.origin)

    return Fusion(fit, build, least_tasks=0)
