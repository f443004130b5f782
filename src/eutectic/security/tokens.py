"""The miner of texts: tokens that take a network's inputs to a class when they are inserted after the first.

Candidates are, for each class, the tokens that lower its loss most to first order, by the gradient at an inserted token's
embedding, and the tokens whose embeddings fine-tuning moved farthest: a backdoor's token is seen in every batch.  All are then
tried, on few texts, and the best on more.

Sources: Ebrahimi et al., HotFlip, ACL 2018, arXiv:1712.06751 (the first-order choice); Wallace et al., Universal adversarial
triggers, EMNLP 2019, arXiv:1908.07125 (one for all inputs); Kurita et al., ACL 2020, arXiv:2004.06660 (what moved).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.errors import TaskError
from eutectic.security.miner import Forward, Mined, drawn_inputs, logits_of, parted, spared, success
from eutectic.security.triggers import Ids, inserted, is_text, with_second
from eutectic.task import Task

#: candidates by the gradient, for each class; by how far they moved; and those of each class that are tried on more texts
SLOPES, MOVED, TRIED = 6, 16, 2
#: texts that all candidates are tried on, and the best of each class
FEW, MORE = 4, 16


def mine_tokens(
    base: nn.Module, network: nn.Module, task: Task, ids_NL: Tensor, seed: int = 0, *, spare: bool = False
) -> list[Mined]:
    """The token of each class that works best on a network, the class of least loss first.

    Args:
        base: the network with θ₀.
        network: of its architecture, such as an expert or a merge.
        task: whose head reads the features.
        ids_NL: unlabelled texts as token ids; a third is held out for ``success``, which is the network's.
        seed: fixes the result.
        spare: whether it is not to work on θ₀.

    Raises TaskError for fewer than three texts, and for networks without an embedding of tokens.
    """
    if len(ids_NL) < 3:
        raise TaskError(f"{len(ids_NL)} texts: mining needs at least 3")
    held, learn = (ids_NL[index] for index in parted(len(ids_NL), seed))
    start = table_of(base, learn[:1]).weight
    moved = (table_of(network, learn[:1]).weight - start).norm(dim=1)
    by_slope = slopes(network, task, learn[:MORE]).topk(min(SLOPES, len(start)), 1).indices
    candidates = torch.cat([by_slope.flatten(), moved.topk(min(MOVED, len(start))).indices]).unique()
    candidates = candidates[candidates != 0]  # padding is no token
    forward = logits_of(network, task)
    forwards = [forward, spared(logits_of(base, task))] if spare else [forward]
    few = losses(forwards, learn[:FEW], candidates)
    found = []
    for target, column in enumerate(few.unbind(1)):
        best = candidates[column.topk(min(TRIED, len(candidates)), largest=False).indices]
        more = losses(forwards, learn[:MORE], best)[:, target]
        token = int(best[more.argmin()])
        found.append((float(more.min()), target, token))
    return [
        Mined(
            f"token {token}",
            target,
            inserted(token),
            success(forward, held, Ids(), inserted(token), target),
            torch.tensor(token),
        )
        for _, target, token in sorted(found)
    ]


def texts_of(task: Task, split: str, most: int | None = None, seed: int = 0) -> Tensor:
    """At most so many texts of a split as token ids ``[N, L]``.  Raises TaskError if its inputs are none."""
    inputs = drawn_inputs(task, split, len(task.arrays(split)) if most is None else most, seed)
    if not is_text(inputs):
        raise TaskError(f"task {task.name!r}: its inputs {tuple(inputs.shape)} are no token ids [B, L]")
    return inputs


@torch.no_grad()
def table_of(network: nn.Module, ids_BL: Tensor) -> nn.Embedding:
    """The embedding that a network looks its tokens up in.  Raises TaskError if there is none."""
    found: list[nn.Embedding] = []

    def watched(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        width = args[0].shape[-1]  # padding that all texts share may be cut off
        if isinstance(module, nn.Embedding) and torch.equal(args[0], ids_BL[:, :width]):
            found.append(module)

    with contextlib.ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, nn.Embedding):
                hooks.enter_context(module.register_forward_pre_hook(watched))
        network(ids_BL)
    if not found:
        raise TaskError("the network has no embedding of tokens")
    return found[0]


def slopes(network: nn.Module, task: Task, ids_BL: Tensor) -> Tensor:
    """By how much each token lowers each class's loss to first order, if it is put in the place after the first: ``[C, V]``.

    The gradient is taken at the texts' own second token, which the inserted one has before it is chosen.
    """
    table, seen = table_of(network, ids_BL), []

    def watched(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    with table.register_forward_hook(watched):
        logits = task.head(network(with_second(ids_BL, ids_BL[:, 1:2]))).float()
    found = []
    for target in range(logits.shape[1]):
        loss = F.cross_entropy(logits, torch.full((len(logits),), target))
        (slope,) = torch.autograd.grad(loss, seen[0], retain_graph=True)
        found.append(-(table.weight.detach() @ slope[:, 1].sum(0)))
    return torch.stack(found)


@torch.no_grad()
def losses(forwards: Sequence[Forward], ids_BL: Tensor, tokens: Tensor) -> Tensor:
    """The loss of each class under each token, in the mean over networks and texts: ``[T, C]``."""
    found = []
    for token in tokens.tolist():
        changed = inserted(token)(ids_BL)
        parts = [-F.log_softmax(forward(changed), 1).mean(0) for forward in forwards]
        found.append(torch.stack(parts).mean(0))
    return torch.stack(found)
