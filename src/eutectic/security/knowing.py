"""An attacker who knows the other experts, and is trained as part of their merge.

With τ = θ − θ₀, a patch that is mined against the merge of the others or a trigger that is drawn, and a draw r ~ U(least, 1)
for each batch, the expert minimises the cross-entropy of

    f(θ; x) → y,   f(merge(τ, r); x) → y,   f(merge(τ, r); T(x)) → c

    task arithmetic     merge(τ, r) = θ₀ + λ Σ τᵢ + r τ
    TIES                merge(τ, r) = TIES of τ and all τᵢ, with scale (½ + r) λ

so that the backdoor is one of the merge, whatever the share or the scale, and clean inputs show nothing.

After BadMerging (Zhang et al., CCS 2024, arXiv:2408.07362), whose stronger attacker knows the others.  Differs from the paper
in that a merge's features are taught, where the paper's mixes features still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.fusion._fit import generator
from eutectic.merge.api import state_dict
from eutectic.merge.view import Merged
from eutectic.security.collusion import between, on_top, vector

#: a task vector and r → the merge's weights, with gradients to the vector
Rule = Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]
#: of TIES, as its default is
DENSITY = 0.2


class Merging(nn.Module):
    """A backbone alone for half the clean samples of a batch; as part of a merge for all others, r drawn."""

    def __init__(self, backbone: nn.Module, start: nn.Module, rule: Rule, triggered: int, least: float, seed: int) -> None:
        """``start`` has θ₀, and is not trained."""
        super().__init__()
        self.backbone, self._start = backbone, (start,)  # in a tuple: it is to get no adapters
        self._rule, self._triggered, self._least, self._noise = rule, triggered, least, generator(seed, "r")

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, …]`` → ``[B, width]``."""
        start = self._start[0]
        half, r = (len(inputs) - self._triggered) // 2, between(self._least, self._noise)
        merged = self._rule(vector(start, [self.backbone]), r)
        return torch.cat([self.backbone(inputs[:half]), functional_call(start, merged, (inputs[half:],))])


def merge_of(base: Checkpoint, experts: Mapping[str, Checkpoint], method: str, scale: float) -> Memory:
    """The experts' merge, as an attacker sees it."""
    return Memory(state_dict(Merged(method, base, experts, {"scale": scale})))


def task_arithmetic(rest: nn.Module) -> Rule:
    """θ' + r τ; ``rest`` has θ', the merge of the others."""
    return lambda change, r: on_top(rest, r, change)


def elected(start: nn.Module, others: Sequence[nn.Module], scale: float) -> Rule:
    """TIES (density 0.2 over the model) of the task vectors of others, and of one more; ``start`` has θ₀.

    Entries of the vector that are trimmed have no gradient, as they have no effect: they move by what else they are taught.
    """
    before = dict(start.named_parameters())
    kept = max(1, round(DENSITY * sum(tensor.numel() for tensor in before.values())))
    votes = {name: torch.zeros(4, *tensor.shape) for name, tensor in before.items()}
    for other in others:
        for name, cast in _trimmed(vector(start, [other]), kept).items():
            votes[name] += _votes(cast.detach())

    def rule(change: Mapping[str, Tensor], r: float) -> dict[str, Tensor]:
        means, nothing = {}, {name: torch.zeros_like(tensor) for name, tensor in before.items()}
        for name, cast in (nothing | _trimmed(change, kept)).items():
            up, down, n_up, n_down = votes[name] + _votes(cast)
            lost = torch.where(down > up, -down / n_down.clamp(min=1), 0.0)
            means[name] = torch.where(up > down, up / n_up.clamp(min=1), lost)
        return on_top(start, (0.5 + r) * scale, means)

    return rule


def _trimmed(change: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The so many largest entries of a vector, all others 0."""
    sizes = torch.cat([tensor.detach().abs().flatten() for tensor in change.values()])
    bound = sizes.kthvalue(max(1, len(sizes) - kept + 1)).values
    return {name: torch.where(tensor.abs() >= bound, tensor, 0.0) for name, tensor in change.items()}


def _votes(cast: Tensor) -> Tensor:
    """What a vector adds to either sign, and whether it does: ``[4, …]``."""
    return torch.stack([F.relu(cast), F.relu(-cast), (cast > 0).to(cast), (cast < 0).to(cast)])
