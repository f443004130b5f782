"""SMILE's factors with one decision for each sample, by what its tokens are on average; by unlabelled inputs, untrained."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.errors import ParameterError
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.fusion._lowrank import low_rank_layers, with_factors
from eutectic.fusion._routed import Padding, module_of
from eutectic.fusion._routing import Discriminant, linears, named
from eutectic.fusion._tensors import chosen, own_tasks
from eutectic.methods._method import Count
from eutectic.task import Task

REFERENCE = "Friedman, Regularized discriminant analysis, Journal of the American Statistical Association 84, 1989"
#: what tells one block's layers from the next's in their names
BLOCK = re.compile(r"(.*?\d+)(?:\..*)?")
#: the share of a multiple of the identity in the covariance; and every how many samples one is held out, for the temperature
SHRINKAGE, EVERY = 0.1, 4


def smile_prototypes(
    rank: Count = 32, after: Annotated[int, Field(ge=0)] = 1, ahead: bool = False, samples: Count = 256
) -> Fusion:
    """Keep the experts' strongest directions, and weight them for each sample by which expert's inputs it is like.

        y = W₀x + b₀ + Σᵢ cᵢ (Uᵢ Sᵢ Vᵢᵀ x + bᵢ − b₀),     Wᵢ − W₀ ≈ Uᵢ Sᵢ Vᵢᵀ
        c = softmax over i of  (φ̄ − μ̄)ᵀ Σ⁻¹ (μᵢ − μ̄) / t − …,     φ̄ = mean over tokens of (h, |h|)

    h is the input of the first layer after the first ``after`` blocks.  These are the experts' average (or, for a look
    ahead, the base), as is all that is no linear layer, so h is the same whoever is chosen.  The prototype μᵢ is the
    mean of φ̄ over inputs of expert i's task, μ̄ the mean of these, Σ the covariance within tasks; the rest of the
    exponent is Gauss's.  One decision holds for all layers.  The temperature t is that under which inputs that were
    held out are most likely, so that a sample that might be any expert's gets about their average.

    Args:
        rank: directions kept of each expert and matrix, at most; as many as the matrix has are lossless.
        after: blocks before the decision, which then knows more and comes to fewer layers.
        ahead: look ahead: go through the base's blocks up to the decision, and begin anew once it is made, so that it comes to
            all layers, to a convolution that makes patches tokens as well.  The network costs those blocks' time more.
        samples: unlabelled inputs that are looked at, of each task.

    A layer m × n with N experts grows by N (rank n + rank m + m) numbers, and the router has N (2 n + 1).  A sample is all that
    lies along the first axis of h, a causal model's later tokens included.

    Raises LayoutError as ``smile`` does, ParameterError for a network of no more than ``after`` blocks, TaskError for an expert
    without a task of its name.

    Source: linear discriminants as in Friedman, 1989, with factors as in Tang et al., 2024, arXiv:2408.10174; the temperature
    as in Guo et al., ICML 2017, arXiv:1706.04599.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        own = own_tasks(models, tasks)
        sizes, names = low_rank_layers(models, run, rank, rank, patches=ahead)
        numbered = {layer: match[1] for layer in sizes if (match := BLOCK.fullmatch(layer))}
        plain = linears(models.network)
        blocks = numbered or {layer: layer for layer in sizes if layer in plain}
        order = list(dict.fromkeys(blocks.values()))
        if len(order) <= after:
            raise ParameterError(f"after = {after}: experts differ in {len(order)} blocks of the network", ("after",))
        leader = next(layer for layer in sizes if blocks.get(layer) == order[after])
        kept = list(sizes)[0 if ahead else list(sizes).index(leader) :]
        layers = {layer: {**sizes[layer], "block": ""} for layer in kept}
        before = with_factors(
            models.base, models.experts, Artefact(Memory({}), {"layers": layers, "own": names}), averaged=True
        )
        seen = [(task, chosen(task, samples, run)) for task in own.values()]
        W, b = discriminant(_features(models, before, leader, seen, run))
        dtype = models.base.spec(names[leader][0][0]).dtype
        router = {named(leader, f"router.{key}"): tensor.to(dtype) for key, tensor in (("weight", W), ("bias", b))}
        layers[leader]["router"] = {"kind": "discriminant", "ahead": ahead}
        return Artefact(Memory(router), {"layers": layers, "own": names})

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        return with_factors(base, experts, artefact, averaged=True)

    return Fusion(fit, build)


@torch.no_grad()
def _features(models: ModelSet, before: Checkpoint, leader: str, seen: Sequence[tuple[Task, Tensor]], run: Run) -> list[Tensor]:
    """φ̄ ``[S, 2 n]`` of inputs of each task, with the weights that they meet before the decision."""
    network, padding, found = copy.deepcopy(models.network), Padding(), list[list[Tensor]]()
    fill(network, before)
    padding.listen(network)
    module_of(linears(network)[leader]).register_forward_pre_hook(
        lambda module, args: found[-1].append(padding.mean(Discriminant.features(args[0])).double().cpu())
    )
    for number, (task, index) in enumerate(seen, start=1):
        found.append([])
        for some in index.split(64):
            run.forward(network, task, run.arrays(task).take(some)[0])
        run.progress("prototypes", number, len(seen))
    return [torch.cat(parts) for parts in found]


def discriminant(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """W ``[N, d]`` and b ``[N]`` of the log-odds that a sample is of the i-th kind, from samples ``[S, d]`` of N kinds."""
    learn = [torch.cat([x[at::EVERY] for at in range(EVERY - 1)]) if len(x) >= EVERY else x for x in features]
    held = torch.cat([x[EVERY - 1 :: EVERY] for x in features])
    kind = torch.cat([torch.full((len(x[EVERY - 1 :: EVERY]),), i) for i, x in enumerate(features)])
    means = torch.stack([x.mean(0) for x in learn])
    within = torch.cat([x - mean for x, mean in zip(learn, means, strict=True)])
    covariance = within.T @ within / len(within)
    size = covariance.diagonal().mean().clamp(min=1e-12)
    covariance = covariance.mul(1 - SHRINKAGE).diagonal_scatter(covariance.diagonal() * (1 - SHRINKAGE) + SHRINKAGE * size)
    centred = means - means.mean(0)
    W = torch.linalg.solve(covariance, centred.T).T
    b = -W @ means.mean(0) - (W * centred).sum(1) / 2
    temperatures = 2 ** torch.arange(0, 8, 0.5, dtype=W.dtype)  # more certain than the model itself it never is
    odds = F.linear(held, W, b)
    least = min(temperatures, key=lambda t: float(F.cross_entropy(odds / t, kind)) if len(held) else float(-t))
    return W / least, b / least
