"""One small trainer: a backbone under a frozen head, all weights or low-rank adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.tuning.lora import attach


class Samples(Protocol):
    """What is trained on: ``Arrays``, or anything else that knows its size and gives inputs and labels of some samples.

    Labels are ``[B]``, or one for each token, ``[B, L]``, with −100 where there is none; the head then gives ``[B, C, L]``.
    """

    def __len__(self) -> int:
        """How many."""
        ...

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Those at ``index`` ``[B]``."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """How an expert is made.

    ``lr`` is the peak of a one-cycle schedule over ``steps`` AdamW steps of ``batch_size`` samples.  ``rank`` 0 tunes all
    weights, else adapters of that rank with ``alpha``.  ``shift`` moves each batch of images by up to so many pixels.
    Forward and backward run in bfloat16 where the processor has instructions for it, the weights stay float32.
    """

    steps: int
    lr: float
    batch_size: int = 32
    rank: int = 0
    alpha: float = 16.0
    shift: int = 0
    seed: int = 0


def fine_tune(
    backbone: nn.Module,
    head: Callable[[Tensor], Tensor],
    train: Samples,
    training: Training,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Minimise the cross-entropy of ``head(backbone(x))`` over ``train``, in place; one seed gives one result on a machine.

    With ``training.rank`` the backbone comes back with its adapters attached.
    """
    if training.rank:
        attach(backbone, training.rank, training.alpha, training.seed)
    with torch.random.fork_rng(devices=[]):  # dropout draws from torch's global generator
        torch.manual_seed(training.seed)
        _train(backbone, head, train, training, progress)
    backbone.eval()


def _train(
    backbone: nn.Module,
    head: Callable[[Tensor], Tensor],
    train: Samples,
    training: Training,
    progress: Callable[[int, float], None],
) -> None:
    backbone.train()
    generator = torch.Generator().manual_seed(training.seed)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training.lr, total_steps=training.steps, pct_start=0.1)
    needed = training.steps * training.batch_size
    epochs = [torch.randperm(len(train), generator=generator) for _ in range(-(-needed // len(train)))]
    for step, index in enumerate(torch.cat(epochs)[:needed].split(training.batch_size), start=1):
        inputs, labels = train.take(index)
        if training.shift:
            inputs = _shifted(inputs, training.shift, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
            features = backbone(inputs)
        loss = F.cross_entropy(head(features.float()), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(step, loss.item())


def multiplies_bfloat16() -> bool:
    """Whether this processor has matrix instructions for bfloat16; without them it is several times slower than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images ``[B, C, H, W]`` moved by one random offset, the border repeated."""
    height, width = images.shape[-2:]
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    return F.pad(images, (most,) * 4, mode="replicate")[..., down : down + height, right : right + width]
