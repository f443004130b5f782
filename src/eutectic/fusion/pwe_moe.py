"""PWE-MoE: one fit for every preference among the tasks, by routers of the preference that unload to dense weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.views import Select
from eutectic.errors import CheckpointError, LayoutError, ParameterError
from eutectic.fusion._coefficients import facts, weighted
from eutectic.fusion._fit import Batches, Loss, backward_of, descend, generator, held_out_loss, mean_over_processes
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import divergence_from, entropy, expert_outputs, fill
from eutectic.fusion._mixing import compiled
from eutectic.fusion._preferences import (
    MOST_OBJECTIVES,
    Preference,
    Scalarisation,
    corners_and_centre,
    dirichlet,
    preferred,
    require_preference,
    step_weights,
)
from eutectic.fusion._tensors import names_of, own_tasks
from eutectic.fusion._weighted import Weighted
from eutectic.merge.view import Merged
from eutectic.methods._method import Count, Finite, Positive
from eutectic.task import Task

REFERENCE = (
    "Tang et al., Towards efficient Pareto set approximation via mixture of experts based model fusion, 2024, arXiv:2406.09770"
)
#: a choice of ``blocks``: one router for each MLP, as transformers and the suites call them, and none for all else
MLP = r"(.*?)\.?(?:mlp\..*|DenseReluDense\..*|intermediate\.dense\..*|(?<!attention\.)output\.dense\..*)"


def pwe_moe(
    preference: Preference | None = None,
    scalarisation: Scalarisation = "linear",
    target: Literal["experts", "entropy"] = "experts",
    hidden: Annotated[int, Field(ge=0, le=2)] = 2,
    concentration: Positive = 1.0,
    only: Preference | None = None,
    steps: Count = 100,
    lr: Positive = 1e-2,
    batch_size: Count = 8,
    patience: Count = 5,
    blocks: str = "(.*)",
    scale: Finite = 0.3,
) -> Fusion:
    """Fit coefficients that follow a preference p among the tasks: each p then gives a dense network that is best for it.

        θ(p)ˡ = θ₀ˡ + Σₖ λₖˡ(p) τₖˡ,     λˡ(p) = W₂ ReLU(W₁ p + b₁) + b₂,     min  E_{p ~ Dirichlet}  Σₖ αₖ Lₖ(θ(p))

    Args:
        preference: a weight for each expert in order, or {expert: weight}; at least 0, their sum 1; by default all the same.
            Nothing that is fitted depends on it, so an artefact can be applied at any other.
        scalarisation: what α is: ``linear`` p; ``epo`` so that pₖLₖ become equal, for at most eight tasks; ``mgda`` the
            steepest descent that all losses have in common, whatever p.
        target: what is fitted to: each task's expert's own outputs, or certainty.
        hidden: layers of a router: 2 as above, with 2K hidden units; 1 for W p + b; 0 for b, which follows no preference.
        concentration: of the Dirichlet distribution: 1 for all p alike, less for more at the corners.
        only: fit to this preference alone.
        steps: of Adam, at most; one preference, and one batch of every task, each.
        lr: Adam's.
        batch_size: of each task.
        patience: stop when Σₖ pₖLₖ of inputs held out, summed over the corners and the centre (or at ``only``), was not
            better so many times in a row, each 20 steps.
        blocks: regular expression of the names of tensors that are routed; those whose first group is the same share a
            router.  By default every tensor has its own.
        scale: λ of trainable tensors that are not routed.

    An expert has the one task of its name.  A router begins at λ(p) = p: at the corners that is the expert itself.  For a task
    one ordinary backward pass gives ∂Lₖ/∂λ in closed form, from where the chain rule goes into the routers; no graph runs
    through the merge.  Raises ParameterError for a preference that is none, LayoutError if no tensor is called like ``blocks``.

    Source: Tang et al., 2024, arXiv:2406.09770.  Differs from the paper in that no label is seen, where the paper has
    cross-entropies on training data; that routers begin at p instead of a constant; that every tensor has its own, where the
    paper has one for each module, of MLPs alone or of all (``blocks``); and that it stops early, at a constant step size.
    """
    require_preference(preference)
    require_preference(only, "only")

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        own, names = own_tasks(models, tasks), list(models.experts)
        preferred(preference, names)
        alone = None if only is None else preferred(only, names, "only")
        if scalarisation == "epo" and len(names) > MOST_OBJECTIVES:
            raise ParameterError(f"scalarisation = 'epo': takes at most {MOST_OBJECTIVES} objectives, not {len(names)}")
        batches = Batches(run, list(own.values()), batch_size)
        loss = divergence_from(expert_outputs(models, batches.tasks, run)) if target == "experts" else entropy
        others = _unrouted(models, blocks)
        equation = Weighted(models.network, models.base, models.experts, run.held)
        arithmetic = Merged("task_arithmetic", models.base, models.experts, {"scale": scale})
        fill(models.network, Select(arithmetic, {name for group in others for name in group}.__contains__))
        labels = [_label(blocks, site.name) or "" for site in equation.sites]
        state = _started(len(set(labels)), len(names), hidden, alone, run.seed)
        points = corners_and_centre(len(names)) if alone is None else alone[None]

        def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
            p = dirichlet(len(names), concentration, run.seed, step) if alone is None else alone
            routers = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
            weights = routed(routers, p, labels)
            losses, by_weight = _each(equation, weights.detach(), batches, step, loss, run)
            by_router = [torch.autograd.grad(weights, list(routers.values()), g, retain_graph=True) for g in by_weight]
            rows = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in by_router])
            alpha = step_weights(scalarisation, rows @ rows.T, losses, p)
            total = (alpha @ rows).split([tensor.numel() for tensor in state.values()])
            found = {name: part.view_as(state[name]) for name, part in zip(state, total, strict=True)}
            return float(p @ losses), found

        def criterion() -> float:
            total = 0.0
            for p in points:
                equation.write(routed(state, p, labels))
                total += held_out_loss(equation.network, batches, loss, run, p.tolist())
            return total

        best = descend("routers", state, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
        about = facts(equation, "task_arithmetic", None) | {"blocks": labels, "others": others, "history": best.history}
        return Artefact(Memory(best.tensors), about)

    def build(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
        about = artefact.about
        if not {"names", "blocks", "others"} <= about.keys():
            raise CheckpointError(f"{artefact.tensors.origin}: the artefact's facts lack `names`, `blocks` or `others`")
        state = {name: artefact.tensors.read(name) for name in artefact.tensors.specs}
        weights = routed(state, preferred(preference, list(experts)), about["blocks"])
        fixed = torch.full((len(experts), len(about["others"])), scale, dtype=torch.float64)
        whole = Memory({"weights": torch.cat([weights, fixed], 1)}, origin=artefact.tensors.origin)
        return weighted(base, experts, Artefact(whole, {**about, "names": [*about["names"], *about["others"]]}))

    return Fusion(fit, build, free=("preference",))


def routed(routers: Mapping[str, Tensor], preference: Tensor, labels: Sequence[str]) -> Tensor:
    """λ(p) ``[K, L]`` of tensors with these routers; ``weight.0`` is ``[routers, 2K, K]``, and so on."""
    x = preference.expand(len(routers["bias.0"]), -1)
    for layer in range(sum(name.startswith("bias") for name in routers)):
        x = x.relu() if layer else x
        product = (routers[f"weight.{layer}"] @ x[..., None])[..., 0] if f"weight.{layer}" in routers else 0
        x = product + routers[f"bias.{layer}"]
    order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return x[[order[label] for label in labels]].T


def _started(routers: int, k: int, hidden: int, alone: Tensor | None, seed: int) -> dict[str, Tensor]:
    """Routers with λ(p) = p for all p ≥ 0; those without a layer for the one p that they are fitted to, or the centre.

    Of the hidden units, K pass p on, and K are random functions of it that count for nothing yet.
    """
    eye, wide = torch.eye(k, dtype=torch.float64), torch.float64
    zeros, unfelt = torch.zeros(k, dtype=wide), torch.zeros(k, k, dtype=wide)
    match hidden:
        case 0:
            layers = {"bias.0": torch.full((k,), 1 / k, dtype=wide) if alone is None else alone}
        case 1:
            layers = {"weight.0": eye, "bias.0": zeros}
        case _:
            random = torch.randn(routers, k, k, generator=generator(seed, "routers"), dtype=wide)
            layers = {
                "weight.0": torch.cat([eye.expand(routers, k, k), random], 1),
                "bias.0": zeros.repeat(2),
                "weight.1": torch.cat([eye, unfelt], 1),
                "bias.1": zeros,
            }
    return {name: t.clone() if t.ndim == 3 else t.repeat(routers, *[1] * t.ndim) for name, t in layers.items()}


def _each(
    equation: Weighted, weights_KL: Tensor, batches: Batches, step: int, loss: Loss, run: Run
) -> tuple[Tensor, list[Tensor]]:
    """The loss of each task ``[K]`` at a step, and ∂Lₖ/∂λ ``[K, L]``, over all processes."""
    losses, found = [], []
    equation.write(weights_KL)
    for task in batches.tasks:
        losses.append(backward_of(equation.network, batches, task, step, loss, run))
        found.append(mean_over_processes(equation.weight_gradient()))
        equation.network.zero_grad(set_to_none=False)
    return mean_over_processes(torch.tensor(losses, dtype=torch.float64)), found


def _label(pattern: str, name: str) -> str | None:
    """What tells a tensor's router from others; None for a tensor without."""
    match = re.fullmatch(pattern, name)
    return match and (match[1] if match.re.groups and match[1] is not None else match[0])


def _unrouted(models: ModelSet, pattern: str) -> list[list[str]]:
    """The names of trainable tensors that are not called like the pattern; they require no gradient any more.

    Raises ParameterError for no regular expression, LayoutError if nothing is left to be routed.
    """
    compiled(pattern)
    names = names_of(models)
    trained = {id(p): p for p in models.network.parameters() if p.requires_grad}
    others = {key: names[key] for key in trained if _label(pattern, names[key][0]) is None}
    if trained and others.keys() == trained.keys():
        raise LayoutError(f"no tensor is called like {pattern!r}; there are {', '.join(names[key][0] for key in trained)}")
    for key in others:
        trained[key].requires_grad_(False)
    return list(others.values())
