"""WEMoE: MLPs become mixtures of the experts' weights, one for each sample, by routers that alone are trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Overlay, Select
from eutectic.errors import CheckpointError, LayoutError, ParameterError
from eutectic.fusion._fit import Batches, backward, descend, generator, held_out_loss
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence_from, entropy, expert_outputs, fill
from eutectic.fusion._routing import DenseExperts, LeadingExperts, Shared, linears, replaced
from eutectic.fusion._tensors import difference, names_of, wide
from eutectic.merge.view import Merged
from eutectic.methods._method import Count, Finite, Positive
from eutectic.task import Task

REFERENCE = "Tang et al., Merging multi-task models via weight-ensembling mixture of experts, ICML 2024, arXiv:2402.00433"
#: the linear layers of MLPs, as transformers and the suites call them
MLP = r"(.*?)\.?(?:mlp\..*|DenseReluDense\..*|intermediate\.dense|(?<!attention\.)output\.dense)"


def wemoe(
    hidden: Annotated[int, Field(ge=0, le=2)] = 2,
    target: Literal["experts", "entropy"] = "experts",
    scale: Finite = 0.3,
    steps: Count = 100,
    lr: Positive = 1e-3,
    batch_size: Count = 8,
    patience: Count = 5,
    blocks: str = MLP,
) -> Fusion:
    """Merge the MLPs' weights anew for each sample, by routers fitted to unlabelled inputs; all else is task arithmetic.

        θ(x) = θ₀ + Σₖ cₖ(x) τₖ in an MLP,     c(x) = mean over tokens t of  W₂ ReLU(W₁ h_t + b₁) + b₂

    where h is the MLP's input.  Neither weighted to a sum of 1 nor positive.  A sample is all that lies along the first axis
    of that input, causal models' later tokens and padding included.

    Args:
        hidden: layers of a router: 2 as above, 1 for W h + b, 0 for b, which no input can change.
        target: what is fitted to: each task's expert's own outputs, or certainty, as in the paper.
        scale: λ of the task vectors outside of MLPs, and of c at the beginning.
        steps: of Adam, at most; one batch of every task each.
        lr: Adam's.
        batch_size: of each task.
        patience: stop when what is fitted to was not better on inputs held out so many times in a row, each 20 steps.
        blocks: regular expression of the paths of linear layers that become mixtures; its first group tells blocks apart.

    The network grows by K times the MLPs' size, and the routers' K + h (K + h + 1) numbers for each MLP of width h.  Raises
    LayoutError for a network without such layers, with those that it has.

    Source: Tang et al., ICML 2024, arXiv:2402.00433, section 3.  Differs from the paper in that it is taught by the experts
    unless told otherwise, adapts on inputs that are not those of the test, and stops early.  Routing is by sample, always.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches = Batches(run, tasks, batch_size)
        loss = divergence_from(expert_outputs(models, tasks, run)) if target == "experts" else entropy
        network = copy.deepcopy(models.network)
        found = _blocks(network, blocks)
        names = names_of(models._replace(network=network))
        kept = [
            name for block in found.values() for layer in block.values() for p in layer.parameters() for name in names[id(p)]
        ]
        fill(network, _outside(models.base, models.experts, kept, scale))
        parts = {
            block: _router(next(iter(layers.values())), len(models.experts), hidden, scale, run.seed, block)
            for block, layers in found.items()
        }
        network = _mixed(network, models.base, models.experts, found, parts)
        routers = {f"{block}:{key}": p for block, part in parts.items() for key, p in part.named_parameters()}
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for parameter in routers.values():
            parameter.requires_grad_(True)
        state = {name: p.detach().to(wide(p), copy=True) for name, p in routers.items()}

        def write() -> None:
            with torch.no_grad():
                for name, parameter in routers.items():
                    parameter.copy_(state[name]).grad = None

        def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
            write()
            value = backward(network, batches, step, loss, run)
            return value, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in routers.items()}

        def criterion() -> float:
            write()
            return held_out_loss(network, batches, loss, run)

        best = descend("routers", state, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
        tensors = {name: tensor.cpu() for name, tensor in best.tensors.items()}
        return Artefact(Memory(tensors), {"blocks": list(found), "kept": kept, "history": best.history})

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        return _outside(base, experts, artefact.about["kept"], scale)

    def network(backbone: nn.Module, base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> nn.Module:
        found, parts = _blocks(backbone, blocks), dict[str, nn.Sequential]()
        if list(found) != artefact.about["blocks"]:
            raise CheckpointError(f"{artefact.tensors.origin}: has the routers of other blocks than the network has")
        for block, layers in found.items():
            parts[block] = _router(next(iter(layers.values())), len(experts), hidden, scale, 0, block)
            parts[block].load_state_dict({key: artefact.tensors.read(f"{block}:{key}") for key in parts[block].state_dict()})
        return _mixed(backbone, base, experts, found, parts)

    return Fusion(fit, build, network)


class _Constant(nn.Module):
    """A router that looks at nothing."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


def _router(first: nn.Linear, outputs: int, hidden: int, scale: float, *key: object) -> nn.Sequential:
    """``[…, h]`` → ``[…, outputs]``, about ``scale`` everywhere: weights of deviation 0.01, by a seed of their own."""
    width = first.in_features
    match hidden:
        case 0:
            router = nn.Sequential(_Constant(outputs))
        case 1:
            router = nn.Sequential(nn.Linear(width, outputs))
        case _:
            router = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
    random = generator(*key, "router")
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(0, 0.01, generator=random)
            else:
                parameter.fill_(scale if name.startswith(f"{len(router) - 1}.") else 0)
    return router.to(first.weight)


def _blocks(network: nn.Module, pattern: str) -> dict[str, dict[str, nn.Linear]]:
    """The layers of each block by path.  Raises ParameterError for no such expression, LayoutError if none matches."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ParameterError(f"blocks = {pattern!r}: no regular expression: {error}", ("blocks",)) from None
    if not expression.groups:
        raise ParameterError(f"blocks = {pattern!r}: put what tells one block from another into (…)", ("blocks",))
    layers, found = linears(network), dict[str, dict[str, nn.Linear]]()
    for path, layer in layers.items():
        match = expression.fullmatch(path)
        if match is not None:
            found.setdefault(match[1] or "", {})[path] = layer
    if not found:
        raise LayoutError(f"no linear layer is called like {pattern!r}; there are {', '.join(layers) or 'none at all'}")
    return found


def _outside(base: Checkpoint, experts: Mapping[str, Checkpoint], kept: Sequence[str], scale: float) -> Checkpoint:
    """Task arithmetic; the base for what is ``kept``."""
    return Overlay(Merged("task_arithmetic", base, experts, {"scale": scale}), Select(base, set(kept).__contains__))


def _mixed(
    network: nn.Module,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    blocks: Mapping[str, Mapping[str, nn.Linear]],
    routers: Mapping[str, nn.Module],
) -> nn.Module:
    """The network with its blocks' layers as mixtures, in place.  Raises LayoutError if no expert changed them."""
    names = names_of(ModelSet(network, base, experts))
    layers, changed = dict[str, nn.Module](), False
    for block, members in blocks.items():
        shared, router = Shared(), [routers[block]]  # of the first alone
        for path, layer in members.items():
            weight, *bias = (
                torch.stack([difference(base, name, expert, names[id(p)][0]) for name, expert in experts.items()])
                for p in layer.parameters()
            )
            changed = changed or bool(weight.any())
            kind = LeadingExperts if router else DenseExperts
            layers[path] = kind(layer, weight, bias[0] if bias else None, shared, *router)
            router = []
    if not changed:
        raise LayoutError(f"no expert differs from the base in the blocks {', '.join(blocks)}, so there is nothing to route")
    return replaced(network, layers)
