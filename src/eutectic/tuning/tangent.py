"""A network's first-order expansion in some of its parameters: f(x; φ₀) + J(x; φ₀) · (φ − φ₀), by forward-mode differentiation.

It is linear in φ, so adding task vectors φₖ − φ₀ adds what the experts do to the features.

An adapter starts from B₀ = 0, where A has no derivative (see ``tuning.lora``): its tangent depends on B alone, and is that of
the weights, f(x; θ₀) + J(x; θ₀) · ΔW with ΔW = s B A₀.  So θ₀ and the folder of the adapter, whose A is A₀, say all.

Source: Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023, arXiv:2305.12827, equation 4; of adapters,
Tang et al., "Parameter-efficient multi-task model fusion with partial linearization", ICLR 2024, arXiv:2310.04742, section 3,
whose code linearises each layer by itself instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@final
class Tangent(nn.Module):
    """f(x; φ₀) + J(x; φ₀) · (φ − φ₀), where φ are some parameters of a network, as they are at each call.

    One forward pass costs about three, and keeps twice as much for the backward pass.  ``state_dict`` is the network's own.
    """

    def __init__(self, network: nn.Module, start: Mapping[str, Tensor]) -> None:
        """``start`` is φ₀ by the parameters' names; parameters that it has not are as in any network."""
        super().__init__()
        self.network, self._names = network, list(start)
        for at, tensor in enumerate(start.values()):
            self.register_buffer(f"start{at}", tensor.detach().clone())
        with warnings.catch_warnings():  # PyTorch's own, of the rules of differentiation that it loads at first use
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.func.jvp(torch.neg, (torch.zeros(1),), (torch.zeros(1),))

    def forward(self, *inputs: Any) -> Tensor:
        """What the network takes → what it gives, a tensor."""
        start = {name: self.get_buffer(f"start{at}") for at, name in enumerate(self._names)}
        step = {name: self.network.get_parameter(name) - start[name] for name in self._names}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            found = torch.func.jvp(lambda phi: torch.func.functional_call(self.network, phi, inputs), (start,), (step,))
        return found[0] + found[1]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The network's, so that checkpoints fit."""
        return self.network.state_dict(*args, **kwargs)


def tangent_of_adapters(backbone: nn.Module) -> Tangent:
    """The tangent of a network in the adapters that were just attached to it, around what they are now."""
    return Tangent(backbone, {name: p for name, p in backbone.named_parameters() if p.requires_grad})


def tangent_at(network: nn.Module, base: Mapping[str, Tensor]) -> Tangent:
    """The tangent around θ₀, by names in the state dict, of a network with any weights θ; what it lacks is no part of φ."""
    known = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
    names = {name: known[id(p)] for name, p in network.named_parameters()}
    return Tangent(network, {name: base[below] for name, below in names.items() if below in base})
