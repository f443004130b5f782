"""SMILE: every linear layer keeps its experts as low-rank factors, and each token chooses among them; no data, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._lowrank import low_rank_layers, matrix_shape, with_factors
from eutectic.methods._method import Count
from eutectic.task import Task

REFERENCE = "Tang et al., SMILE: Zero-shot sparse mixture of low-rank experts construction, 2024, arXiv:2408.10174"


def smile(rank: Count = 32, gate_rank: Count = 16, top_k: Count = 1, rest: Literal["base", "average"] = "base") -> Fusion:
    """Keep the experts' strongest directions in every linear layer, and let each token choose by how long it is on them.

        y = W₀x + b₀ + Σᵢ pᵢ (Uᵢ Sᵢ Vᵢᵀ x + bᵢ − b₀),     Wᵢ − W₀ ≈ Uᵢ Sᵢ Vᵢᵀ
        pᵢ = softmax over the top_k of ‖Vᵢᵀ x‖, by the gate_rank strongest directions; 0 for the other experts

    Looks at no data; tasks may be left out.  Every token and layer chooses for itself.  LoRA experts that began with the same A
    have nearly the same Vᵢ, whose gate cannot tell them apart, however well the factors hold each of them: with a few
    unlabelled inputs ``smile_prototypes`` can.

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
    that a convolution whose windows lie side by side, as a vision transformer's first, has experts, as it is linear in patches;
    that a layer of which only biases changed takes their mean, where the paper's keeps the base's; and that there are no dense
    experts.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        sizes, own = low_rank_layers(models, run, rank, max(rank, gate_rank), patches=True)
        for layer, about in sizes.items():
            _, width = matrix_shape(models.base, own[layer][0][0], about["turned"])
            sizes[layer] = {**about, "top": top_k, "gate": min(gate_rank, width - 1)}
        return Artefact(Memory({}), {"layers": sizes, "own": own})

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        return with_factors(base, experts, artefact, averaged=rest == "average")

    return Fusion(fit, build, least_tasks=0)
