"""Fitting the coefficients of the equation, and the weights that they and a mask make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.spec import Layout, TensorSpec
from eutectic.checkpoint.views import Masked
from eutectic.errors import CheckpointError, ParameterError
from eutectic.fusion._fit import Batches, Descended, Loss, backward, descend, held_out_loss
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._weighted import Site, Weighted
from eutectic.merge.view import Merged, Override
from eutectic.methods._method import validated
from eutectic.task import Task

Per = Literal["tensor", "task"]
#: the closed forms that are linear in a parameter ``weights``
LINEAR = ("task_arithmetic", "ties_sum")


def vectors(
    method: str, parameters: Mapping[str, Any] | None, base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> dict[str, Checkpoint]:
    """What each expert adds to a merge that is linear in its ``weights``: θ₀ + T(τₖ), by expert.

    Raises ParameterError for a method that is none of ``LINEAR``, or parameters that leave nothing to fit.
    """
    given = dict(parameters or {})
    if method not in LINEAR:
        raise ParameterError(
            f"method {method!r} is not linear in `weights`; coefficients are fitted of {', '.join(LINEAR)}", ("method",)
        )
    if fitted := [key for key in ("scale", "weights") if key in given]:
        raise ParameterError(f"parameters: `{fitted[0]}` of {method} is what is fitted: leave it out", ("parameters",))
    validated(method, given)
    if method == "task_arithmetic":
        return dict(experts)
    given["scale"] = 1.0
    units = torch.eye(len(experts)).tolist()
    return {name: Merged(method, base, experts, given | {"weights": unit}) for name, unit in zip(experts, units, strict=True)}


def equation_over(method: str, parameters: Mapping[str, Any] | None, models: ModelSet, run: Run) -> Weighted:
    """The equation over what a method makes of each expert.  Raises as ``vectors`` and ``Weighted`` do."""
    given = vectors(method, parameters, models.base, models.experts)
    # what is made of an expert would be made again each time that it is read
    return Weighted(models.network, models.base, given, run.held if method == "task_arithmetic" else torch.bfloat16)


class Shaped(Checkpoint):
    """Flat tensors of another checkpoint, in the shapes and under the names of these; tied tensors share one."""

    def __init__(self, flat: Checkpoint, names: Mapping[str, str], layout: Layout) -> None:
        """``names`` are name → name in ``flat``."""
        self._flat, self._names = flat, dict(names)
        self.origin, self.files = flat.origin, flat.files
        self._specs = {name: TensorSpec(layout[name].shape, flat.spec(below).dtype) for name, below in names.items()}

    @property
    def specs(self) -> Layout:
        """See the class."""
        return self._specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._flat._read(self._names[name], start, stop)

    def close(self) -> None:
        """Close the checkpoint below."""
        self._flat.close()


def fit_coefficients(
    equation: Weighted,
    batches: Batches,
    loss: Loss,
    run: Run,
    *,
    per: Per,
    init: float,
    steps: int,
    lr: float,
    patience: int,
    mask: Sequence[Tensor] | None = None,
    what: str = "coefficients",
) -> tuple[Tensor, Descended]:
    """λ ``[K, L]`` that minimise a loss over the tasks, from ``init`` on."""
    k, sites = equation.shape
    weights = torch.full((k, sites if per == "tensor" else 1), init, dtype=torch.float64)

    def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
        equation.write(weights.expand(k, sites), mask)
        value = backward(equation.network, batches, step, loss, run)
        return value, {"weights": equation.weight_gradient(mask).sum_to_size(weights.shape)}

    def criterion() -> float:
        equation.write(weights.expand(k, sites), mask)
        return held_out_loss(equation.network, batches, loss, run)

    found = descend(what, {"weights": weights}, gradients, criterion, run, steps=steps, lr=lr, patience=patience)
    return found.tensors["weights"].expand(k, sites), found


def fitted_to(
    loss_of: Callable[[ModelSet, Sequence[Task], Run], Loss],
    *,
    per: Per,
    init: float,
    steps: int,
    lr: float,
    batch_size: int,
    patience: int,
    method: str,
    parameters: Mapping[str, Any] | None,
) -> Fusion:
    """The fusion that fits λ to the loss that ``loss_of`` makes of the models and tasks."""

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        batches = Batches(run, tasks, batch_size)
        loss = loss_of(models, tasks, run)
        equation = equation_over(method, parameters, models, run)
        weights, found = fit_coefficients(
            equation, batches, loss, run, per=per, init=init, steps=steps, lr=lr, patience=patience
        )
        return Artefact(Memory({"weights": weights.float()}), facts(equation, method, parameters) | {"history": found.history})

    return Fusion(fit, weighted)


class Sited(Protocol):
    """An equation over some tensors."""

    @property
    def sites(self) -> Sequence[Site]:
        """The tensors whose coefficients are fitted, in order."""


def facts(equation: Sited, method: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``weighted`` needs to know of an equation beside λ and the mask."""
    return {
        "over": {"method": method, "parameters": dict(parameters or {})},
        "names": [[site.name, *site.aliases] for site in equation.sites],
    }


def weighted(base: Checkpoint, experts: Mapping[str, Checkpoint], artefact: Artefact) -> Checkpoint:
    """The merge that an artefact describes: by ``weights`` ``[K, L]``, if it has them, and under ``mask.NAME``, if it has any.

    Tensors that are no site are merged with weights of 1 / K each.  Another method than task arithmetic is run once for each
    expert, to have what it makes of that one.  Experts may be wider than the base, whose dtypes the result has.
    Raises CheckpointError if the artefact's facts and tensors do not fit.
    """
    tensors, inputs, overrides = artefact.tensors, dict(experts), []
    match artefact.about:
        case {"over": {"method": str(method), "parameters": dict(parameters)}, "names": list(names)}:
            pass
        case _:
            raise CheckpointError(f"{tensors.origin}: the artefact's facts lack `over` or `names`")
    if "weights" in tensors.specs:
        found, wanted = tensors.specs["weights"], (len(experts), len(names))
        if found.shape != wanted:
            raise CheckpointError(f"{tensors.origin}: `weights` is {found}, not one for each expert and tensor, {list(wanted)}")
        inputs = vectors(method, parameters, base, experts)
        method, parameters = "task_arithmetic", {"scale": 1.0, "weights": [1 / len(experts)] * len(experts)}
        columns = tensors.read("weights").double().T.tolist()
        overrides = [
            Override(name, {"weights": column}) for group, column in zip(names, columns, strict=True) for name in group
        ]
    masked = {name: f"mask.{group[0]}" for group in names for name in group if f"mask.{group[0]}" in tensors.specs}
    if not masked and all(model.specs == base.specs for model in inputs.values()):
        return Merged(method, base, inputs, parameters, overrides)
    wide = torch.float64 if any(spec.dtype == torch.float64 for spec in base.specs.values()) else torch.float32
    return Masked(base, Merged(method, base, inputs, parameters, overrides, dtype=wide), Shaped(tensors, masked, base.specs))
