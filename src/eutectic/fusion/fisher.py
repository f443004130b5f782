"""Fisher merging: an average in which each weight of each expert counts as much as its predictions depend on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import LayoutError, NonFiniteError, TaskError
from eutectic.fusion._fit import generator
from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._losses import fill
from eutectic.fusion._tensors import chosen, finished, names_of, over_average, own_tasks, wide
from eutectic.methods._method import Count, Positive
from eutectic.task import Task

REFERENCE = "Matena & Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022, arXiv:2111.09832"


def fisher(samples: Count = 64, epsilon: Positive = 1e-6) -> Fusion:
    """Average the experts' weights by the diagonal of each one's Fisher information on its own task.

        θ = Σₖ (Fₖ + ε) ⊙ θₖ / Σₖ (Fₖ + ε),     Fₖ = E_x E_{y ~ p(y | x; θₖ)} (∂ log p(y | x; θₖ) / ∂θ)²

    Each task's expert is the one of its name.  What needs no gradient (buffers, frozen parameters) is averaged.

    Args:
        samples: inputs of each task, at most; a forward and a backward pass of one input for each.
        epsilon: ε, below which a weight's information does not count.

    The memory is that of five networks, however many experts there are.  Raises LayoutError for a network without trainable
    parameters, NonFiniteError naming the expert and tensor.

    Source: Matena & Raffel, NeurIPS 2022, arXiv:2111.09832, without a weight for each model.  Differs from the paper in that y
    is one seeded draw for each input.  Squares are of single inputs' gradients, never of one that was summed over a batch.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        own, names = own_tasks(models, tasks), names_of(models)
        parameters = {names[id(p)][0]: p for p in models.network.parameters() if p.requires_grad}
        if not parameters:
            raise LayoutError("no parameter of the network requires a gradient, so there is none to weigh")
        theta = {name: torch.zeros_like(p, dtype=wide(p)) for name, p in parameters.items()}
        mass = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
        for expert, task in own.items():
            fill(models.network, models.experts[expert])
            found = information(models.network, parameters, task, samples, run)
            for name, weight in found.items():
                if not torch.isfinite(weight).all():
                    raise NonFiniteError(f"expert {expert!r} on its task: the gradients of {name!r} are not finite")
                # the mean so far moves towards the next expert: experts that agree stay as they are, to the bit
                mass[name] += weight.add_(epsilon)
                theta[name].lerp_(parameters[name].detach().to(weight.dtype), weight.div_(mass[name]))
        return finished(theta, names, models.base)

    return Fusion(fit, over_average)


def information(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], task: Task, samples: int, run: Run
) -> dict[str, Tensor]:
    """The diagonal Fisher information of a network's predictions on a task's inputs, by parameter.

    Inputs go through one by one, which works for every network, and on a CPU takes as long as ``torch.func.vmap``: most of the
    time goes into writing a gradient for each input.
    """
    found = {name: torch.zeros_like(p, dtype=wide(p)) for name, p in parameters.items()}
    arrays, index = run.arrays(task), chosen(task, samples, run)
    draws = torch.rand(len(index), generator=generator(run.seed, task.name, "labels"), dtype=torch.float64)
    for number, (at, draw) in enumerate(zip(index, draws.tolist(), strict=True), start=1):
        log_p = F.log_softmax(run.forward(network, task, arrays.take(at[None])[0]), dim=1)[0]
        if not log_p.requires_grad:
            raise TaskError(f"task {task.name!r}: its head cuts the graph, so there is no gradient of its predictions")
        label = (log_p.detach().double().exp().cumsum(0) < draw).sum().clamp(max=len(log_p) - 1)
        gradients = torch.autograd.grad(log_p[label], list(parameters.values()), allow_unused=True)
        for square, gradient in zip(found.values(), gradients, strict=True):
            if gradient is not None:
                gradient = gradient.to(square.dtype)
                square.addcmul_(gradient, gradient, value=1 / len(index))
        run.progress(f"Fisher information: {task.name}", number, len(index))
    return found
