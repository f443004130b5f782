"""Descent on a few small tensors: batches, Adam, early stopping, resumption, data parallelism.

Everything random is a function of (seed, task, step), so a fit that was interrupted, or spread over processes, takes the same
samples.  Under ``torchrun`` every process takes its share of each batch, and the gradients of the small tensors are averaged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.checkpoint.save import save_tensors
from eutectic.errors import NonFiniteError, ParameterError, StoppedError, TaskError
from eutectic.fusion._fusion import Run
from eutectic.task import Arrays, Task

#: a quarter of the samples, and at most so many a task, are held out to see when to stop
HELD_OUT = 64
#: how often that is looked at, in steps
EVERY = 20
_STATE = "state.json"

#: (task, logits [B, C], index [B] of the samples) → a scalar, the mean over the batch
Loss = Callable[[Task, Tensor, Tensor], Tensor]


class Batches:
    """The inputs of every task, in a seeded order without end; some are held out."""

    def __init__(self, run: Run, tasks: Sequence[Task], batch_size: int) -> None:
        """Raises TaskError for a task without samples, ParameterError if processes cannot share a batch evenly."""
        self.tasks, self.batch_size, self._seed = list(tasks), batch_size, run.seed
        if batch_size % world():
            raise ParameterError(f"batch_size = {batch_size} is not a multiple of the {world()} processes")
        self._arrays: dict[str, Arrays] = {}
        self.learn: dict[str, Tensor] = {}
        self.held_out: dict[str, Tensor] = {}
        self._epochs: dict[str, tuple[int, Tensor]] = {}
        for task in tasks:
            arrays = run.arrays(task)
            order = self._order(task, -1, len(arrays))
            held = min(len(arrays) // 4, HELD_OUT)
            self._arrays[task.name], self.held_out[task.name], self.learn[task.name] = arrays, order[:held], order[held:]

    def inputs(self, task: Task, index: Tensor) -> Tensor:
        """The inputs at ``index``."""
        return self._arrays[task.name].take(index)[0]

    def index(self, task: Task, step: int) -> Tensor:
        """Which samples of a task this process takes at a step, ``[batch_size / processes]``."""
        learn = self.learn[task.name]
        first = step * self.batch_size
        places = range(first + rank(), first + self.batch_size, world())
        return torch.stack([learn[self._epoch(task, place // len(learn))[place % len(learn)]] for place in places])

    def _epoch(self, task: Task, epoch: int) -> Tensor:
        known = self._epochs.get(task.name)
        if known is None or known[0] != epoch:
            known = self._epochs[task.name] = (epoch, self._order(task, epoch, len(self.learn[task.name])))
        return known[1]

    def _order(self, task: Task, epoch: int, n: int) -> Tensor:
        return torch.randperm(n, generator=generator(self._seed, task.name, epoch))


def generator(*key: object) -> torch.Generator:
    """A generator of its own for each key."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def backward(network: nn.Module, batches: Batches, step: int, loss: Loss, run: Run) -> float:
    """Add ∂L/∂θ of a step to the network's gradients, task after task; returns L, the sum over tasks.

    Raises NonFiniteError naming the task, TaskError for a task whose loss depends on nothing that is fitted.
    """
    total = sum(backward_of(network, batches, task, step, loss, run) for task in batches.tasks)
    return float(mean_over_processes(torch.tensor(total, dtype=torch.float64)))


def backward_of(network: nn.Module, batches: Batches, task: Task, step: int, loss: Loss, run: Run) -> float:
    """As ``backward``, of one task, and this process's share alone."""
    index = batches.index(task, step)
    value = loss(task, run.forward(network, task, batches.inputs(task, index)), index)
    if not torch.isfinite(value):
        raise NonFiniteError(f"task {task.name!r}: the loss is {value.item()}")
    if not value.requires_grad:
        raise TaskError(f"task {task.name!r}: its loss has no gradient by what is fitted; does its head cut the graph?")
    value.backward()
    return value.item()


@torch.no_grad()
def held_out_loss(network: nn.Module, batches: Batches, loss: Loss, run: Run, weights: Sequence[float] | None = None) -> float:
    """L over the samples that are held out; infinite if it is not finite, NaN if there are none.

    ``weights``, one a task, are 1 by default; tasks of weight 0 are left out.
    """
    total = math.nan
    for task, weight in zip(batches.tasks, weights or [1.0] * len(batches.tasks), strict=True):
        index = batches.held_out[task.name]
        if len(index) and weight:
            value = weight * loss(task, run.forward(network, task, batches.inputs(task, index)), index).item()
            total = value + (0 if math.isnan(total) else total)
            if not math.isfinite(value):
                return math.inf
    return total


class Descended(NamedTuple):
    """The best state by the held-out loss (the last one if nothing is held out), and (step, loss, held-out loss) lines.

    A line has None for a loss that was not taken, or was not finite.
    """

    tensors: dict[str, Tensor]
    history: list[tuple[int, float | None, float | None]]


def descend(
    what: str,
    state: Mapping[str, Tensor],
    gradients: Callable[[int], tuple[float, Mapping[str, Tensor]]],
    criterion: Callable[[], float],
    run: Run,
    *,
    steps: int,
    lr: float,
    patience: int,
) -> Descended:
    """Adam on ``state``, in place, over ``gradients(step)`` → (loss, gradient of each tensor).

    Every ``EVERY`` steps ``criterion`` (a label-free loss, smaller is better) is taken, and the state kept in
    ``run.folder/WHAT``; after ``patience`` times without a better one it ends.  A fit that was interrupted is
    carried on from there.  What is not finite ends it too, and is left in ``run.stopped``; without any good step before,
    NonFiniteError is raised.
    """
    tensors = dict(state)
    optimiser = torch.optim.Adam(tensors.values(), lr=lr, fused=True)
    best = {name: tensor.clone() for name, tensor in tensors.items()}
    history: list[tuple[int, float, float]] = []
    path = None if run.folder is None else run.folder / what
    first = _resume(path, tensors, best, optimiser, history) if path is not None and path.exists() else 0

    def look(step: int, loss: float) -> None:
        # processes whose sums round differently must still agree on when to stop
        value = float(mean_over_processes(torch.tensor(criterion(), dtype=torch.float64)))
        if not history or not value >= min(line[2] for line in history):
            for name, tensor in tensors.items():
                best[name].copy_(tensor)
        history.append((step, loss, value))
        if path is not None and rank() == 0:
            _keep(path, step, tensors, best, optimiser, history)

    if not history:
        look(0, math.nan)
    for step in range(first, steps):
        if _worse_for(history) >= patience:
            break
        try:
            loss, found = gradients(step)
            for name, tensor in tensors.items():
                tensor.grad = mean_over_processes(found[name].to(tensor))
                if not torch.isfinite(tensor.grad).all():
                    raise NonFiniteError(f"the loss is finite, but its gradient by {name!r} is not")
        except NonFiniteError as error:
            stopped = StoppedError(f"{what}, step {step}: {error}")
            if len(history) < 2:  # nothing is better than what it began with
                raise stopped from None
            run.stopped.append(stopped)
            break
        optimiser.step()
        optimiser.zero_grad()
        del found  # a mask's gradient is as large as the network's, which the next passes are about to make
        run.progress(what, step + 1, steps)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            look(step + 1, loss)
    return Descended(best, [(step, _finite(loss), _finite(value)) for step, loss, value in history])


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _worse_for(history: Sequence[tuple[int, float, float]]) -> int:
    """How many looks ago the best one was; 0 if nothing is held out."""
    values = [line[2] for line in history]
    return 0 if math.isnan(values[-1]) else len(values) - 1 - min(range(len(values)), key=values.__getitem__)


def _keep(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimiser: torch.optim.Adam,
    history: Sequence[tuple[int, float, float]],
) -> None:
    found = {f"now/{name}": tensor for name, tensor in tensors.items()} | {f"best/{name}": t for name, t in best.items()}
    for at, moments in optimiser.state_dict()["state"].items():
        found |= {f"{moment}/{list(tensors)[at]}": value for moment, value in moments.items()}
    said = {"step": step, "history": [[s, str(loss), str(value)] for s, loss, value in history]}
    with published(folder, replace=True) as partial:
        save_tensors(Memory({name: tensor.cpu() for name, tensor in found.items()}), partial)
        (partial / _STATE).write_text(json.dumps(said), encoding="utf-8")


def _resume(
    folder: Path,
    tensors: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimiser: torch.optim.Adam,
    history: list[tuple[int, float, float]],
) -> int:
    said = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    moments: dict[int, dict[str, Tensor]] = {}
    with SafetensorsFile(folder / "model.safetensors") as file:
        for at, name in enumerate(tensors):
            tensors[name].copy_(file.read(f"now/{name}"))
            best[name].copy_(file.read(f"best/{name}"))
            if f"step/{name}" in file.specs:
                moments[at] = {moment: file.read(f"{moment}/{name}").clone() for moment in ("step", "exp_avg", "exp_avg_sq")}
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    history += [(step, float(loss), float(value)) for step, loss, value in said["history"]]
    return said["step"]


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the group of processes that ``torchrun`` began, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    if device == "cuda":  # each process has a card of its own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # coefficients stay on the processor wherever the network is
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Which of the processes this is."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over all processes, in each of them."""
    if world() > 1:
        distributed.all_reduce(tensor)
        tensor = tensor / world()
    return tensor
