"""What a fusion method is: ``fit`` gives a small artefact, and ``build`` makes weights of it.

K = experts, L = tensors whose coefficients are fitted, p = elements of a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.save import Progress, silent
from eutectic.errors import StoppedError, TaskError
from eutectic.task import Arrays, Task

Protocol = Literal["inductive", "transductive"]


class ModelSet(NamedTuple):
    """θ₀ and the experts, and the network that they are weights of; fitting overwrites the network's weights."""

    network: nn.Module
    base: Checkpoint
    experts: Mapping[str, Checkpoint]


@dataclasses.dataclass(frozen=True)
class Run:
    """How a method is fitted, whatever the method.

    ``protocol`` says which inputs it sees, never their labels: those of ``adapt`` (inductive), or those of ``test``
    (transductive, as the papers did).  ``autocast`` runs forward and backward passes in bfloat16.  With ``folder`` the state is
    kept there, so that an interrupted fit is carried on by the same call.  ``storage`` says where task vectors
    are: in the experts' files, read again whenever they are needed, or in memory, rounded to bfloat16.  By default it is files
    where a processor fits, which they cost a few per cent of the time, and memory where an accelerator does.  ``stopped`` gets
    what ended a fit before its time.
    """

    seed: int = 0
    protocol: Protocol = "inductive"
    device: str = "cpu"
    autocast: bool = False
    folder: Path | None = None
    progress: Progress = silent
    storage: Literal["files", "memory"] | None = None
    stopped: list[StoppedError] = dataclasses.field(default_factory=list, compare=False)

    @property
    def split(self) -> str:
        """The split whose inputs are seen."""
        return "adapt" if self.protocol == "inductive" else "test"

    @property
    def held(self) -> torch.dtype | None:
        """The dtype in which task vectors are held in memory; None if they are read again."""
        where = self.storage or ("files" if self.device == "cpu" else "memory")
        return None if where == "files" else torch.bfloat16

    def within(self, folder: Path) -> Run:
        """The same, kept in another folder."""
        return dataclasses.replace(self, folder=folder)

    def features(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """What a network gives the heads, in float32 or wider."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            features = network(inputs.to(self.device))
        return features.float() if self.autocast else features

    def forward(self, network: nn.Module, task: Task, inputs: Tensor) -> Tensor:
        """A task's logits ``[B, C]``, in float32 or wider.  Raises TaskError if the head does not fit the network."""
        features = self.features(network, inputs)
        try:
            logits = task.head(features)
        except RuntimeError as error:
            raise TaskError(f"task {task.name!r}: its head does not fit features {tuple(features.shape)}: {error}") from None
        if logits.ndim != 2 or len(logits) != len(inputs):
            raise TaskError(f"task {task.name!r}: its head gives {tuple(logits.shape)}, not logits [{len(inputs)}, classes]")
        return logits

    def arrays(self, task: Task) -> Arrays:
        """The samples of a task that may be seen.  Raises TaskError if there are none."""
        found = task.arrays(self.split)
        if not len(found):
            raise TaskError(f"task {task.name!r}: the split {self.split!r} is empty, so there is nothing to adapt to")
        return found


class Artefact(NamedTuple):
    """What was fitted: small tensors, and in ``about`` what is needed to apply and to trust them, as JSON-ready data.

    ``about`` has ``method``, ``parameters``, ``seed``, ``protocol``, ``models`` (the content hashes of ``base`` and
    ``experts.NAME``) and whatever the method adds.
    """

    tensors: Checkpoint
    about: Mapping[str, Any]


class Fusion(NamedTuple):
    """A method with its parameters bound.

    ``fit`` raises TaskError for tasks it cannot use, NonFiniteError for a loss that is not finite.  ``build`` gets the base
    and the experts, and an artefact's tensors and facts; its result is lazy.

    A method that keeps its experts has ``layers`` in ``about``, which say what becomes of the network's layers (see
    ``_routing.routed``), and tensors of theirs in what ``build`` gives.  ``least_tasks`` is 0 for one that looks at no data.
    ``free`` names parameters that ``fit`` does not depend on: an artefact can be applied with other values of them.
    ``labelled`` is the split of which a method sees labels too, whatever the protocol; None for all that see inputs alone.
    """

    fit: Callable[[ModelSet, Sequence[Task], Run], Artefact]
    build: Callable[[Checkpoint, Mapping[str, Checkpoint], Artefact], Checkpoint]
    least_tasks: int = 1
    free: tuple[str, ...] = ()
    labelled: str | None = None


def expert_of(task: Task, models: ModelSet) -> str:
    """The name of a task's expert: the task's own.  Raises TaskError if there is none."""
    if task.name not in models.experts:
        raise TaskError(f"task {task.name!r} has no expert of its name; there are {', '.join(models.experts)}")
    return task.name
