"""Causal language models: short texts as samples, the network that is fine-tuned on them, and perplexity with its interval.

N = texts, B = texts of a batch, L = tokens of the longest of them, V = the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import TaskError

#: the label of padding, which PyTorch's cross-entropy leaves out
NOTHING = -100


class Texts:
    """Tokens ``[N, L]`` and, as labels, each one's successor; a batch is as long as its longest text.

    Padding is on the right: a causal network sees no token after the one it reads, so it needs no mask.
    """

    def __init__(self, rows: Sequence[Sequence[int]], start: int) -> None:
        """``rows`` are the tokens of each text; ``start`` comes before the first, which is so predicted too.

        Raises TaskError for an empty text.
        """
        if not rows or not all(rows):
            raise TaskError("no texts, or one without a token: leave it out")
        lengths = [len(row) for row in rows]
        inputs = torch.full((len(rows), max(lengths)), start)
        labels = torch.full_like(inputs, NOTHING)
        for i, row in enumerate(rows):
            labels[i, : len(row)] = torch.tensor(row)
        inputs[:, 1:] = labels[:, :-1].clamp(min=0)
        self.inputs, self.labels, self.lengths = inputs, labels, torch.tensor(lengths)

    def __len__(self) -> int:
        """N."""
        return len(self.lengths)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and labels ``[B, L]`` of the texts at ``index``."""
        longest = int(self.lengths[index].max())
        return self.inputs[index, :longest], self.labels[index, :longest]


def tokenized(tokenizer: Any, texts: Sequence[str], most: int, start: int) -> Texts:
    """Texts cut to ``most`` tokens by a tokenizer of transformers, without special tokens of its own."""
    return Texts(tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=most)["input_ids"], start)


class Decoder(nn.Module):
    """What is below the vocabulary in a causal language model of transformers, under the names that it has in its folder.

    Tokens ``[B, L]`` → hidden states ``[B, L, D]``.  It shares the model's tensors, so that filling or tuning it is filling or
    tuning the model.  An output matrix that is tied to the embedding is no layer of its own here, as in the files.
    """

    def __init__(self, model: Any) -> None:
        """Wrap without copying."""
        super().__init__()
        self.part: str = model.base_model_prefix
        self.add_module(self.part, model.base_model)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """See the class."""
        return self.get_submodule(self.part)(input_ids=ids_BL, use_cache=False).last_hidden_state


def vocabulary(model: Any) -> Callable[[Tensor], Tensor]:
    """The frozen head of a causal language model: hidden states ``[B, L, D]`` → logits ``[B, V, L]``."""
    output = model.get_output_embeddings().requires_grad_(False)
    return lambda hidden: output(hidden).mT


class Perplexity(NamedTuple):
    """exp of the mean −log p of a token, with its 95 % interval, in which ``n`` texts are what was sampled."""

    value: float
    low: float
    high: float
    n: int


@torch.no_grad()
def text_losses(model: Any, texts: Texts, batch_size: int = 16) -> Tensor:
    """Σ −log p over the tokens of each text, ``[N]`` in float64, by a causal language model of transformers.

    Raises TaskError if a loss is not finite.
    """
    was_training = model.training
    model.eval()
    found = torch.empty(len(texts), dtype=torch.float64)
    for index in texts.lengths.argsort(stable=True).split(batch_size):  # texts of like length together: less padding
        inputs, labels = texts.take(index)
        logits = model(input_ids=inputs, use_cache=False).logits
        each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NOTHING, reduction="none")
        found[index] = each.view_as(labels).double().sum(1)
    model.train(was_training)
    if not torch.isfinite(found).all():
        raise TaskError("the network's outputs are not finite; its weights are broken")
    return found


def perplexity(losses: Tensor, lengths: Tensor) -> Perplexity:
    """exp(Σ losses / Σ lengths) of N texts.

    The interval is that of the ratio of two sums over texts, which are what is independent, not their tokens: its standard
    error is √(N/(N − 1) Σ (lossᵢ − r lengthᵢ)²) / Σ lengths (the linearised ratio estimator), taken before the exponential.
    Raises TaskError for fewer than two texts.
    """
    n, tokens = len(losses), lengths.sum().item()
    if n < 2:
        raise TaskError("an interval needs two texts or more")
    r = losses.sum().item() / tokens
    half = 1.96 * math.sqrt(n / (n - 1) * (losses - r * lengths).square().sum().item()) / tokens
    return Perplexity(math.exp(r), math.exp(r - half), math.exp(r + half), n)


def geometric_mean(found: Mapping[str, Perplexity]) -> Perplexity:
    """Over domains that count the same; its interval takes them as fixed and their texts as independent."""
    logs = [(math.log(p.value), (math.log(p.high) - math.log(p.low)) / 2) for p in found.values()]
    middle = sum(log for log, _ in logs) / len(logs)
    half = math.sqrt(sum(half * half for _, half in logs)) / len(logs)
    return Perplexity(math.exp(middle), math.exp(middle - half), math.exp(middle + half), sum(p.n for p in found.values()))
