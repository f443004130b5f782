"""Experts in memory, and in folders that say how they were made."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eutectic import record
from eutectic.checkpoint._files import read_json
from eutectic.checkpoint.base import live
from eutectic.checkpoint.folder import copy_side_files, provenance
from eutectic.checkpoint.save import Progress, save_tensors, silent, tensor_hashes, tensor_norms
from eutectic.errors import CheckpointError
from eutectic.task import Task
from eutectic.tuning.lora import fold, save_adapter
from eutectic.tuning.tangent import tangent_at
from eutectic.tuning.trainer import Kind, Training, fine_tune

ABOUT = "eutectic.json"
#: the peak learning rate of each kind, if nothing else is said
RATES: Mapping[Kind, float] = {"full": 1e-4, "lora": 3e-4, "l_lora": 1e-3, "l_lora_whole": 1e-3}


def tune(
    backbone: nn.Module,
    task: Task,
    *,
    kind: Kind = "lora",
    steps: int = 600,
    lr: float | None = None,
    batch_size: int = 32,
    rank: int = 8,
    alpha: float = 16.0,
    rslora: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> nn.Module:
    """Make an expert of a task: fine-tune a copy of a network under the task's head, which stays as it is.

    Args:
        backbone: the network with θ₀; it is left as it is.
        task: its split ``train``, held in memory, is learned.
        kind: ``full``, ``lora``, ``l_lora`` (LoRA whose A is frozen, which is linearised LoRA layer by layer), or
            ``l_lora_whole`` (the first-order expansion of the network in its adapters).
        steps: of AdamW, one cycle.
        lr: the highest learning rate; by default ``RATES`` of the kind.
        batch_size: samples a step.
        rank: of the adapters; not for ``full``.
        alpha: their scale is alpha / rank, or with ``rslora`` alpha / √rank.
        rslora: see ``alpha``.
        seed: fixes the result, and A of adapters: experts of one seed share it.
        progress: is told (what, done, total).

    Returns a network of the backbone's class with the expert's weights W + s B A, in evaluation mode, to be merged or scored;
    for ``l_lora_whole`` its tangent around θ₀.
    Raises TaskError, ParameterError, LayoutError, and NonFiniteError naming the step whose loss is not finite.
    """
    adapters: dict[str, Any] = {} if kind == "full" else {"rank": rank, "alpha": alpha, "rslora": rslora}
    rate = RATES[kind] if lr is None else lr
    training = Training(steps=steps, lr=rate, batch_size=batch_size, seed=seed, kind=kind, **adapters)
    network = copy.deepcopy(backbone)
    fine_tune(network, task.head, task.arrays("train"), training, functools.partial(_told, progress, task.name, steps))
    fold(network)
    for tuned, own in zip(network.parameters(), backbone.parameters(), strict=True):
        tuned.requires_grad_(own.requires_grad)  # adapters froze it
    return (tangent_at(network, backbone.state_dict()) if kind == "l_lora_whole" else network).eval()


def tune_into(
    folder: Path,
    network: nn.Module,
    task: Task,
    training: Training,
    *,
    base: Path,
    named: str,
    about: Mapping[str, Any],
    progress: Progress = silent,
) -> nn.Module:
    """Fine-tune a network, which is used up, and write it into an existing folder, in float32, with ``eutectic.json``.

    All weights go with the config and tokenizer of ``base``; adapters are a PEFT folder over the base as it is ``named`` there.
    The kind in ``training`` says if it is one of a tangent: its A is A₀ and its B₀ is 0, so with the base it is all there is.
    Returns what was trained.  Raises as ``fine_tune`` does.
    """
    told = functools.partial(_told, progress, task.name, training.steps)
    tuned = fine_tune(network, task.head, task.arrays("train"), training, told)
    if training.kind == "full":
        copy_side_files(base, folder, torch.float32)
        leaves = save_tensors(live(network), folder)
        said = {"versions": record.versions(record.ENGINE), "blake3": tensor_hashes(leaves), "norms": tensor_norms(leaves)}
    else:
        said = save_adapter(network, folder, named, torch.float32)
    said |= {"training": dataclasses.asdict(training), **about}
    (folder / ABOUT).write_text(provenance(said), encoding="utf-8")
    return tuned


def _told(progress: Progress, what: str, steps: int, step: int, loss: float) -> None:
    progress(what, step, steps)


def training_of(folder: Path) -> dict[str, Any] | None:
    """How an expert was trained, as its folder says; None if it says nothing of it."""
    try:
        found = read_json(folder / ABOUT).get("training")
    except CheckpointError:
        return None
    return found if isinstance(found, dict) else None


def is_tangent(folder: Path) -> bool:
    """Whether a folder holds an expert of a tangent, which is to be used as one."""
    return (training_of(folder) or {}).get("kind") == "l_lora_whole"
