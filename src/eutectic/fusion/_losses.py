"""What coefficients are fitted to without labels: certainty, or the experts' own outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eutectic.checkpoint.base import Checkpoint
from eutectic.fusion._fit import Loss
from eutectic.fusion._fusion import ModelSet, Run, expert_of
from eutectic.task import Task


def entropy(task: Task, logits: Tensor, index: Tensor) -> Tensor:
    """The mean entropy of the predictions, −Σ_c p_c log p_c, in nats."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """The mean KL(target ‖ p) over a batch, in nats, of logits ``[B, C]`` and the log p ``[B, C]`` that they should give."""
    return F.kl_div(F.log_softmax(logits, dim=1), target.to(logits), log_target=True, reduction="batchmean")


def divergence_from(outputs: Mapping[str, Tensor]) -> Loss:
    """The mean KL(expert ‖ merged) over a batch, in nats; ``outputs`` has the experts' log p ``[N, C]`` by task."""

    def loss(task: Task, logits: Tensor, index: Tensor) -> Tensor:
        return divergence(logits, outputs[task.name][index])

    return loss


@torch.no_grad()
def expert_outputs(models: ModelSet, tasks: Sequence[Task], run: Run) -> dict[str, Tensor]:
    """Log p ``[N, C]`` of each task's own expert on all that may be seen; the network is left with some expert's weights."""
    found = {}
    for number, task in enumerate(tasks):
        run.progress("experts' outputs", number, len(tasks))
        fill(models.network, models.experts[expert_of(task, models)])
        found[task.name] = outputs(models.network, task, run)
    return found


@torch.no_grad()
def outputs(network: torch.nn.Module, task: Task, run: Run) -> Tensor:
    """Log p ``[N, C]`` of a network as it is, on all of a task's inputs that may be seen."""
    logits = [run.forward(network, task, inputs) for inputs, _ in run.arrays(task).batches(64)]
    return F.log_softmax(torch.cat(logits), dim=1)


@torch.no_grad()
def fill(network: torch.nn.Module, weights: Checkpoint) -> None:
    """Copy a checkpoint's floating-point tensors into a network, in place; tied names that it lacks follow the others."""
    for name, tensor in network.state_dict().items():
        if name in weights.specs and tensor.dtype.is_floating_point:
            tensor.copy_(weights.read(name))
