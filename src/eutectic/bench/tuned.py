"""Experts that are made of a suite's tasks beside its own, and how they are opened again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import final

import torch
from torch import nn

from eutectic.bench.evaluate import evaluate, fields_of
from eutectic.bench.suite import Suite
from eutectic.bench.zoo import own_training
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.folder import adapter_base, open_path
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.peft import CONFIG_FILE
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.save import Progress, silent
from eutectic.checkpoint.views import Cast
from eutectic.errors import NonFiniteError
from eutectic.fusion._folder import layers_of
from eutectic.fusion._routed import Description
from eutectic.merge.api import state_dict
from eutectic.record import Record
from eutectic.tuning.experts import RATES, is_tangent, tune_into
from eutectic.tuning.tangent import tangent_at
from eutectic.tuning.trainer import Kind, Training


def training_for(
    suite: Suite,
    kind: Kind,
    *,
    steps: int | None = None,
    lr: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    seed: int = 0,
) -> Training:
    """How an expert of a kind is trained: as the suite's own are, as far as nothing else is said.

    A kind that is not the suite's own has the learning rate of ``RATES``, and adapters by default rank 8.
    Raises ParameterError.
    """
    own = own_training(suite)
    rate = own.lr if kind == own.kind else RATES[kind]
    return Training(
        steps=own.steps if steps is None else steps,
        lr=rate if lr is None else lr,
        batch_size=own.batch_size,
        rank=rank if rank is not None else 0 if kind == "full" else own.rank or 8,
        alpha=own.alpha if alpha is None else alpha,
        shift=own.shift,
        seed=seed,
        kind=kind,
        rslora=rslora,
    )


def make_expert(
    suite: Suite, task: str, training: Training, out: Path, *, replace: bool = False, progress: Progress = silent
) -> list[Record]:
    """Train an expert of one of a suite's tasks into a folder, whole or not at all; its accuracy on ``val`` and on ``test``.

    Raises OutputError before any work if ``out`` exists and ``replace`` is not set, UnknownNameError, and as ``fine_tune``.
    """
    known, base = suite.task(task), suite.folder / "base"
    with published(out, replace=replace, inputs=[suite.folder]) as folder:
        network = suite.backbone()
        about = {"suite": suite.name, "task": task, "inputs": {"base": {"blake3": fingerprint(suite.base)}}}
        named = os.path.relpath(base.resolve(), out.resolve())
        try:
            network = tune_into(folder, network, known, training, base=base, named=named, about=about, progress=progress)
        except NonFiniteError as error:
            raise NonFiniteError(f"task {task!r}, {error}") from None
        said = fields_of(folder) | {"suite": suite.name, "inputs": {"base": fingerprint(suite.base)}}
        return [found for split in ("val", "test") for found in evaluate(network, [known], split=split, **said)]


def loaded(suite: Suite, folder: Path) -> tuple[nn.Module, Checkpoint]:
    """The network of any folder of a suite's architecture, and its weights: a model, a mixture, an adapter, or a tangent's.

    Adapters are added in float32, whatever their base is stored in.  Raises CheckpointError, LayoutError.
    """
    weights = open_path(folder)
    if not (folder / CONFIG_FILE).exists():
        return suite.backbone(weights, layers_of(folder)), weights
    base = adapter_base(folder)
    assert base is not None  # or it could not have been opened
    wide = Cast(open_path(base), torch.float32)
    weights = open_lora(folder, wide)
    network = suite.backbone(weights)
    return (tangent_at(network, state_dict(wide)).eval() if is_tangent(folder) else network), weights


@final
class Tangents(Suite):
    """A suite whose experts, and what is made of them, are weights of the tangent around θ₀."""

    def backbone(
        self, weights: Checkpoint | None = None, layers: Mapping[str, Description] = MappingProxyType({})
    ) -> nn.Module:
        """See the class."""
        return tangent_at(super().backbone(weights, layers), state_dict(self.base)).eval()


def with_experts(suite: Suite, folder: Path) -> Suite:
    """The suite with other experts, in folders by task."""
    some = next((path for path in (folder / task for task in suite.classes) if path.exists()), folder)
    return (Tangents if is_tangent(some) else Suite)(suite.folder, folder)
