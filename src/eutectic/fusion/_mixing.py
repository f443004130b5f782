"""Mixtures of the experts' MLPs: which layers they are of, what lies outside of them, and how their routers are fitted."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.checkpoint.views import Overlay, Select
from eutectic.errors import LayoutError, ParameterError, TaskError
from eutectic.fusion._fit import Batches, backward, descend, generator, held_out_loss, mean_over_processes
from eutectic.fusion._fusion import Artefact, ModelSet, Run
from eutectic.fusion._losses import divergence_from, entropy, expert_outputs, fill
from eutectic.fusion._lowrank import matrix_shape
from eutectic.fusion._routed import Description, MergedExperts, Patches, Turned
from eutectic.fusion._routing import gates, linears, named, routed, router
from eutectic.fusion._tensors import difference_flat, differences, names_of, wide
from eutectic.merge.view import Merged
from eutectic.task import Task

Hidden = Annotated[int, Field(ge=0, le=2)]
Target = Literal["experts", "entropy"]
Start = Literal["tasks", "scale"]
#: inputs of each task that routers begin with, and the regression's ridge over the mean of its diagonal
SHOWN, RIDGE = 256, 0.02
#: what is tried for the coefficients that routers begin with
STRENGTHS = (1.0, 1.5, 2.0, 2.5, 3.0)
#: the linear layers of MLPs, as transformers and the suites call them
MLP = r"(.*?)\.?(?:mlp\..*|DenseReluDense\..*|intermediate\.dense|(?<!attention\.)output\.dense)"


def compiled(blocks: str) -> re.Pattern[str]:
    """A method's parameter ``blocks``.  Raises ParameterError if it is no regular expression."""
    try:
        return re.compile(blocks)
    except re.error as error:
        raise ParameterError(f"blocks = {blocks!r}: no regular expression: {error}", ("blocks",)) from None


def blocks_of(network: nn.Module, pattern: str, patches: bool = False) -> dict[str, dict[str, nn.Linear]]:
    """The layers of each block by name, empty ones left out; with ``patches`` as ``linears`` has them.

    Raises ParameterError for no such expression, LayoutError if none matches.
    """
    expression = compiled(pattern)
    if not expression.groups:
        raise ParameterError(f"blocks = {pattern!r}: put what tells one block from another into (…)", ("blocks",))
    layers, found = linears(network, patches), dict[str, dict[str, nn.Linear]]()
    for name, layer in layers.items():
        match = expression.fullmatch(name)
        if match is not None and layer.weight.numel():
            found.setdefault(match[1] or "", {})[name] = layer
    if not found:
        raise LayoutError(f"no linear layer is called like {pattern!r}; there are {', '.join(layers) or 'none at all'}")
    return found


def plan(
    models: ModelSet, pattern: str, hidden: int, kind: Mapping[str, Any], shared_router: str | None = None
) -> dict[str, Description]:
    """Descriptions of the routed layers: each block has a router of its own, or all but ``Patches`` the one of the name given.

    Raises as ``blocks_of`` does, and LayoutError for a shared router of blocks that differ in width.
    """
    layers, widths = dict[str, Description](), dict[str, int]()
    for block, members in blocks_of(models.network, pattern, patches=True).items():
        for at, (name, layer) in enumerate(members.items()):
            layers[name] = dict(kind) | {"experts": len(models.experts), "block": block, "turned": isinstance(layer, Turned)}
            if at == 0:
                shares = shared_router is not None and not isinstance(layer, Patches)
                if shares:
                    widths[name] = layer.in_features
                layers[name] = {**layers[name], "router": {"name": shared_router if shares else name, "hidden": hidden}}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name} of {width}" for name, width in widths.items())
        raise LayoutError(f"one router cannot serve blocks whose inputs differ in width: {said}")
    return layers


def kept_names(models: ModelSet, layers: Mapping[str, Description]) -> list[str]:
    """The base's tensors that routed layers have for their own."""
    names, known = names_of(models), linears(models.network, patches=True)
    return [name for layer in layers for p in known[layer].parameters() for name in names[id(p)]]


def outside(base: Checkpoint, experts: Mapping[str, Checkpoint], kept: Sequence[str], scale: float) -> Checkpoint:
    """Task arithmetic; the base for what is ``kept``."""
    return Overlay(Merged("task_arithmetic", base, experts, {"scale": scale}), Select(base, set(kept).__contains__))


@final
class Stacked(Checkpoint):
    """Task vectors of the experts as one tensor ``[N, n]``, or of a layer's matrix ``[N, m, n]``; it owns nothing."""

    def __init__(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], names: Mapping[str, str], turned: Collection[str] = ()
    ) -> None:
        """``names`` are name → name in the base, of which those of ``turned`` are matrices that come out transposed."""
        self._base, self._experts, self._names, self._turned = base, dict(experts), dict(names), set(turned)
        self.origin, self.files = base.origin, base.files
        self._specs = {}
        for name, below in names.items():
            shape = base.spec(below).shape
            if len(shape) > 1:
                shape = matrix_shape(base, below, name in self._turned)
            self._specs[name] = TensorSpec((len(experts), *shape), base.spec(below).dtype)

    @property
    def specs(self) -> Layout:
        """See the class."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        below, parts = self._names[name], list[Tensor]()
        p = self._base.spec(below).numel
        if name in self._turned:
            whole = differences(self._base, self._experts, below).mT
            return whole.to(self._specs[name].dtype).reshape(-1)[start:stop]
        for at, (expert, weights) in enumerate(self._experts.items()):
            first, last = max(start - at * p, 0), min(stop - at * p, p)
            if first < last:
                parts.append(difference_flat(self._base, expert, weights, below, first, last).to(self._specs[name].dtype))
        return torch.cat(parts) if parts else self._base.read_flat(below, 0, 0)

    def grain(self, name: str) -> int:
        """What is transposed is read whole."""
        return self._specs[name].numel if name in self._turned else 1

    def need_bytes(self, name: str, n: int) -> int:
        """With what is wide on the way."""
        return 24 * n


def router_begun(width: int, outputs: int, hidden: int, scale: float, *key: object) -> nn.Sequential:
    """A router that gives about ``scale`` everywhere: weights of deviation 0.01, by a seed of their own."""
    made, random = router(width, outputs, hidden), generator(*key, "router")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(0, 0.01, generator=random)
            else:
                parameter.fill_(scale if name.startswith(f"{len(made) - 1}.") else 0)
    return made


def routers_begun(models: ModelSet, layers: Mapping[str, Description], scale: float, seed: int) -> dict[str, Tensor]:
    """The tensors of all routers at their beginning, under the names that they have in the mixture."""
    known, found = linears(models.network, patches=True), dict[str, dict[str, Tensor]]()
    for name, about in layers.items():
        if "router" in about and about["router"]["name"] not in found:
            key, linear = about["router"]["name"], known[name]
            made = router_begun(linear.in_features, about["experts"], about["router"]["hidden"], scale, seed, key)
            found[key] = {named(name, f"router.{part}"): p.detach().to(linear.weight) for part, p in made.named_parameters()}
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


@torch.no_grad()
def tell_tasks_apart(network: nn.Module, batches: Batches, experts: Sequence[str], run: Run) -> None:
    """Set the last layer of every router so that c is nearest to 1 for a sample's own expert, and to 0 for the others.

    A ridge regression on the router's features of at most ``SHOWN`` inputs a task, none of them held out, block after block in
    one forward pass, as a block's input depends on how those before it are routed.  One router of several blocks is fitted to
    all of them together; one that looks at nothing stays as it is.
    Raises TaskError if inputs of different tasks have not one shape, as they go through the network together.
    """
    tasks = batches.tasks
    inputs = [batches.inputs(task, batches.learn[task.name][:SHOWN]) for task in tasks]
    if len({part.shape[1:] for part in inputs}) > 1:
        raise TaskError(
            f"start = 'tasks': the tasks' inputs have the shapes {', '.join(str(tuple(i.shape[1:])) for i in inputs)}"
        )
    own = torch.cat(
        [torch.full((len(part),), list(experts).index(task.name)) for task, part in zip(tasks, inputs, strict=True)]
    )
    targets = nn.functional.one_hot(own, len(experts)).double().to(run.device)
    sums: dict[nn.Module, list[Tensor]] = {}

    def solve(gate: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(gate, MergedExperts)
        assert isinstance(gate.router, nn.Sequential)
        last = gate.router[-1]
        if not isinstance(last, nn.Linear):
            return
        features = gate.shared.padding.mean(gate.router[:-1](gate.tokens(args[0]))).double()
        x = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        found = [x.T @ x, x.T @ targets]
        sums[gate.router] = found if gate.router not in sums else [a + b for a, b in zip(sums[gate.router], found, strict=True)]
        gram, right = sums[gate.router]
        ridge = RIDGE * gram.diagonal()[:-1].mean() * torch.ones_like(gram.diagonal())
        ridge[-1] = 0  # the bias is free
        solution = torch.linalg.solve(gram + ridge.diag(), right)
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])

    hooks = [gate.register_forward_pre_hook(solve) for gate in gates(network).values()]
    try:
        network(torch.cat(inputs).to(run.device))
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def strengthen(network: nn.Module, criterion: Callable[[], float]) -> None:
    """Multiply what all routers give by one of ``STRENGTHS``: they are tried in turn until ``criterion`` is no longer less.

    Pruned task vectors do less than whole ones, so c = 1 is too little for them.
    """
    lasts = [gate.router[-1] for gate in gates(network).values() if isinstance(gate.router, nn.Sequential)]
    begun = {p: p.clone() for last in lasts if isinstance(last, nn.Linear) for p in last.parameters()}
    if not begun:
        return
    found = list[float]()
    for strength in STRENGTHS:
        for parameter, plain in begun.items():
            parameter.copy_(strength * plain)
        found.append(float(mean_over_processes(torch.tensor(criterion(), dtype=torch.float64))))
        if not found[-1] < min(found[:-1], default=math.inf):
            break
    best = STRENGTHS[min(range(len(found)), key=found.__getitem__)]
    for parameter, plain in begun.items():
        parameter.copy_(best * plain)


def fit_routers(
    models: ModelSet,
    tasks: Sequence[Task],
    run: Run,
    layers: Mapping[str, Description],
    build: Callable[[Checkpoint, Mapping[str, Checkpoint], Artefact], Checkpoint],
    *,
    target: Target,
    start: Start,
    scale: float,
    steps: int,
    lr: float,
    batch_size: int,
    patience: int,
) -> Artefact:
    """The routers of a mixture that ``build`` gives the tensors of, fitted to the tasks' inputs; nothing else is trained."""
    batches = Batches(run, tasks, batch_size)
    loss = divergence_from(expert_outputs(models, tasks, run)) if target == "experts" else entropy
    begun = routers_begun(models, layers, scale, run.seed)
    about = {"layers": dict(layers), "kept": kept_names(models, layers)}
    weights = build(models.base, models.experts, Artefact(Memory(begun), about))
    network = routed(copy.deepcopy(models.network), layers, weights)
    fill(network, Select(weights, models.base.specs.__contains__))  # routed layers have taken the rest
    network.requires_grad_(False)
    known = network.state_dict(keep_vars=True)
    routers = {name: known[name].requires_grad_(True) for name in begun}
    if start == "tasks":
        tell_tasks_apart(network, batches, list(models.experts), run)
        if target == "experts":  # certainty would always have more
            strengthen(network, lambda: held_out_loss(network, batches, loss, run))
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
    tensors = {name: tensor.to(begun[name].dtype).cpu() for name, tensor in best.tensors.items()}
    return Artefact(Memory(tensors), about | {"history": best.history})
