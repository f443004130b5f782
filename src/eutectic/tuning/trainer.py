"""One small trainer: a backbone under a frozen head, all weights or low-rank adapters, of the network or of its tangent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import NonFiniteError, ParameterError
from eutectic.tuning.lora import attach
from eutectic.tuning.tangent import tangent_of_adapters

#: all weights; LoRA; linearised LoRA, layer by layer, and of the whole network
Kind = Literal["full", "lora", "l_lora", "l_lora_whole"]


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

    ``lr`` is the peak of a one-cycle schedule over ``steps`` AdamW steps of ``batch_size`` samples.  ``kind`` ``full`` tunes
    all weights, the others adapters of ``rank`` with ``alpha``, see ``tuning.lora``; their scale is α / r, with ``rslora``
    α / √r.  ``shift`` moves each batch of images by up to so many pixels.
    Forward and backward run in bfloat16 where the processor has instructions for it, the weights stay float32.
    """

    steps: int
    lr: float
    batch_size: int = 32
    rank: int = 0
    alpha: float = 16.0
    shift: int = 0
    seed: int = 0
    kind: Kind = "full"
    rslora: bool = False

    def __post_init__(self) -> None:
        """Raises ParameterError for what cannot be trained with."""
        if (self.kind == "full") != (self.rank == 0):
            raise ParameterError(
                f"rank = {self.rank}: kind {self.kind!r} "
                + ("has no adapters, so leave the rank out" if self.kind == "full" else "needs a rank of at least 1")
            )
        positive = {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "alpha": self.alpha}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ParameterError(f"{name} = {value}: give a positive number")
        if self.rank < 0 or self.shift < 0:
            raise ParameterError(f"rank = {self.rank}, shift = {self.shift}: neither can be negative")


def fine_tune(
    backbone: nn.Module,
    head: Callable[[Tensor], Tensor],
    train: Samples,
    training: Training,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> nn.Module:
    """Minimise the cross-entropy of ``head(backbone(x))`` over ``train``, in place; one seed gives one result on a machine.

    Returns the network that was trained, in evaluation mode: the backbone, with its adapters attached if it was given some,
    or for ``l_lora_whole`` the tangent around it.  Raises NonFiniteError naming the step at which the loss is not finite,
    LayoutError for a backbone without linear layers, ParameterError for a rank that is larger than a layer.
    """
    if training.kind != "full":
        frozen_a = training.kind != "lora"
        attach(backbone, training.rank, training.alpha, training.seed, rslora=training.rslora, frozen_a=frozen_a)
    network = tangent_of_adapters(backbone) if training.kind == "l_lora_whole" else backbone
    with torch.random.fork_rng(devices=[]):  # dropout draws from torch's global generator
        torch.manual_seed(training.seed)
        _train(network, head, train, training, progress)
    return network.eval()


def _train(
    network: nn.Module,
    head: Callable[[Tensor], Tensor],
    train: Samples,
    training: Training,
    progress: Callable[[int, float], None],
) -> None:
    network.train()
    generator = torch.Generator().manual_seed(training.seed)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training.lr, total_steps=training.steps, pct_start=0.1)
    needed = training.steps * training.batch_size
    epochs = [torch.randperm(len(train), generator=generator) for _ in range(-(-needed // len(train)))]
    for step, index in enumerate(torch.cat(epochs)[:needed].split(training.batch_size), start=1):
        inputs, labels = train.take(index)
        if training.shift:
            inputs = _shifted(inputs, training.shift, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
            features = network(inputs)
        loss = F.cross_entropy(head(features.float()), labels)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"step {step} of {training.steps}: the loss is {value}; lower lr = {training.lr}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(step, value)


def multiplies_bfloat16() -> bool:
    """Whether this processor has matrix instructions for bfloat16; without them it is several times slower than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images ``[B, C, H, W]`` moved by one random offset, the border repeated."""
    height, width = images.shape[-2:]
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    return F.pad(images, (most,) * 4, mode="replicate")[..., down : down + height, right : right + width]
