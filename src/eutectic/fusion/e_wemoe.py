"""E-WEMoE: WEMoE with pruned task vectors, held sparse, and one router for all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import LayoutError
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._mixing import MLP, Hidden, Start, Target, fit_routers, outside, plan
from eutectic.fusion._sparse import Sparse, packed_layer
from eutectic.merge.compose import Joined
from eutectic.methods._method import Count, Finite, Positive
from eutectic.task import Task

REFERENCE = (
    "Shen et al., Efficient and effective weight-ensembling mixture of experts for multi-task model merging, 2024, "
    "arXiv:2410.21804"
)


def e_wemoe(
    density: Annotated[float, Field(gt=0, le=1)] = 0.1,
    hidden: Hidden = 1,
    target: Target = "experts",
    start: Start = "tasks",
    scale: Finite = 0.3,
    steps: Count = 60,
    lr: Positive = 1e-4,
    batch_size: Count = 8,
    patience: Count = 5,
    blocks: str = MLP,
) -> Fusion:
    """Merge pruned task vectors of the MLPs anew for each sample, by one router for all blocks; all else is task arithmetic.

        θ(x) = θ₀ + Σₖ cₖ(x) prune(τₖ) in an MLP,     c(x) = mean over tokens t of  W h_t + b

    where h is that MLP's input, and prune keeps the largest entries of each tensor.  See ``wemoe``.

    Args:
        density: share of the entries that are kept: 1 − ρ in the paper.
        hidden: layers of the router: 1 as above, 2 for W₂ ReLU(W₁ h + b₁) + b₂, as in the paper, 0 for b.
        target: what is fitted to: each task's expert's own outputs, or certainty, as in the paper.
        start: where routers begin: ``tasks`` at a closed form that tells the tasks' inputs apart, c near 1 for the own
            expert and 0 for others, times the first of 1, 1.5, … 3 beyond which the experts' outputs are fitted no better
            (1 for ``entropy``); ``scale`` at c = ``scale`` for all, as in the paper.
        scale: λ of the task vectors outside of MLPs, and of c at the beginning if that is ``scale``.
        steps: of Adam, at most; one batch of every task each.
        lr: Adam's.
        batch_size: of each task.
        patience: stop when what is fitted to was not better on inputs held out so many times in a row, each 20 steps.
        blocks: regular expression of the names of layers, linear ones or a convolution that makes patches tokens, that become
            mixtures; its first group tells blocks apart.  Such a convolution has a router of its own.

    The network grows by 5 K density bytes for each number of the MLPs, in float32, and a router of K (h + 1) numbers.
    Raises LayoutError for a network without such layers, or whose blocks differ in width.

    Source: Shen et al., 2024, arXiv:2410.21804, section 4.  Differs from the paper as ``wemoe`` does, and in that what is
    pruned takes no memory.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        layers = plan(models, blocks, hidden, {"kind": "sparse"}, shared_router="all blocks")
        for number, (layer, about) in enumerate(layers.items(), start=1):
            found = packed_layer(models.base, models.experts, layer, about["turned"], density)
            layers[layer] = {**about, "counts": list(found.counts)}
            run.progress("pruning", number, len(layers))
        if not any(sum(about["counts"]) for about in layers.values()):
            raise LayoutError(f"no expert differs from the base in {', '.join(layers)}, so there is nothing to route")
        return fit_routers(
            models, tasks, run, layers, build,
            target=target, start=start, scale=scale, steps=steps, lr=lr, batch_size=batch_size, patience=patience,
        )  # fmt: skip

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        rest = outside(base, experts, artefact.about["kept"], scale)
        return Joined([rest, Sparse(base, experts, artefact.about["layers"], density), artefact.tensors], rest.origin)

    return Fusion(fit, build)
