"""WEMoE: MLPs become mixtures of the experts' weights, one for each sample, by routers that alone are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import LayoutError
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._lowrank import Factors, Layer, matrix_shape, most_directions
from eutectic.fusion._mixing import MLP, Hidden, Stacked, Start, Target, fit_routers, outside, plan
from eutectic.fusion._routed import Description
from eutectic.fusion._routing import named
from eutectic.fusion._tensors import differences
from eutectic.merge.compose import Joined
from eutectic.methods._method import Count, Finite, Positive
from eutectic.task import Task

REFERENCE = "Tang et al., Merging multi-task models via weight-ensembling mixture of experts, ICML 2024, arXiv:2402.00433"


def wemoe(
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
    """Merge the MLPs' weights anew for each sample, by routers fitted to unlabelled inputs; all else is task arithmetic.

        θ(x) = θ₀ + Σₖ cₖ(x) τₖ in an MLP,     c(x) = mean over tokens t of  W h_t + b

    where h is the MLP's input.  Neither weighted to a sum of 1 nor positive.  A sample is all that lies along the first axis
    of that input; tokens that an ``attention_mask`` ``[B, T]`` hides do not count, causal models' later tokens do.

    Args:
        hidden: layers of a router: 1 as above, 2 for W₂ ReLU(W₁ h + b₁) + b₂, as in the paper, 0 for b, which no input changes.
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
            mixtures; its first group tells blocks apart.

    The network grows by K times the MLPs' size, of adapters by their factors, and by the routers' K (h + 1) numbers for each
    MLP of width h.  Raises LayoutError for a network without such layers, with those that it has.

    Source: Tang et al., ICML 2024, arXiv:2402.00433, section 3.  Differs from the paper in that routers of one layer begin
    where they tell the tasks apart, and are taught by the experts, unless told otherwise; and in that it adapts on inputs that
    are not those of the test, and stops early.  Routing is by sample, always.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        layers = plan(models, blocks, hidden, {"kind": "dense"})
        ranks = _ranks(models.base, models.experts, layers)
        for layer, rank in ranks.items():
            m, n = matrix_shape(models.base, named(layer, "weight"), turned=False)  # either way, for a size
            if rank * (m + n) < m * n:
                layers[layer] = {**layers[layer], "kind": "factored", "rank": rank}
        if not any(ranks.values()) and not _any_shift(models.base, models.experts, layers):
            raise LayoutError(f"no expert differs from the base in {', '.join(layers)}, so there is nothing to route")
        return fit_routers(
            models, tasks, run, layers, build,
            target=target, start=start, scale=scale, steps=steps, lr=lr, batch_size=batch_size, patience=patience,
        )  # fmt: skip

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        layers, rest = artefact.about["layers"], outside(base, experts, artefact.about["kept"], scale)
        kept = (_task_vectors(base, experts, layers), _factors(base, experts, layers))
        return Joined([rest, *kept, artefact.tensors], rest.origin)

    return Fusion(fit, build)


def _ranks(base: Checkpoint, experts: Mapping[str, Checkpoint], layers: Mapping[str, Description]) -> dict[str, int]:
    """The highest rank that an expert's change of each layer's matrix may have; 0 where it is the base's in all."""
    return {
        layer: max(most_directions(base, weights, named(layer, "weight")) for weights in experts.values()) for layer in layers
    }


def _any_shift(base: Checkpoint, experts: Mapping[str, Checkpoint], layers: Mapping[str, Description]) -> bool:
    """Whether an expert changed any layer's bias."""
    biases = [bias for layer in layers if (bias := _bias(base, layer)) is not None]
    return any(differences(base, experts, bias).any() for bias in biases)


def _rank(about: Description) -> int | None:
    """Of a layer's factors; None for whole matrices."""
    match dict(about):
        case {"kind": "factored", "rank": int(rank)}:
            return rank
    return None


def _factors(base: Checkpoint, experts: Mapping[str, Checkpoint], layers: Mapping[str, Description]) -> Factors:
    """L, R and d of every layer that has factors."""
    return Factors(
        base,
        experts,
        {
            named(layer, ""): Layer(named(layer, "weight"), _bias(base, layer), rank, rank, bool(about.get("turned")))
            for layer, about in layers.items()
            if (rank := _rank(about)) is not None
        },
    )


def _task_vectors(base: Checkpoint, experts: Mapping[str, Checkpoint], layers: Mapping[str, Description]) -> Stacked:
    """D and d of every other layer."""
    dense = [layer for layer, about in layers.items() if _rank(about) is None]
    names = {named(layer, "deltas"): named(layer, "weight") for layer in dense}
    names |= {named(layer, "shift"): bias for layer in dense if (bias := _bias(base, layer)) is not None}
    return Stacked(base, experts, names, [named(layer, "deltas") for layer in dense if layers[layer].get("turned")])


def _bias(base: Checkpoint, layer: str) -> str | None:
    return name if (name := named(layer, "bias")) in base.specs else None
