"""Which layers of a network are routed, and how they get into it.

A description, plain data by the name of a layer, says which layers are routed and how large they are; with it a network is
made anew from a folder.  The experts' tensors are named after the layer, beside its ``weight`` and ``bias``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import LayoutError
from eutectic.fusion._routed import (
    DenseExperts,
    Description,
    FactoredExperts,
    LookAhead,
    LowRankExperts,
    LowRankOfSample,
    MergedExperts,
    Padding,
    Patches,
    Routed,
    Shared,
    SparseExperts,
    Turned,
    module_of,
)


class Constant(nn.Module):
    """A router that looks at nothing."""

    def __init__(self, outputs: int) -> None:
        """Of as many outputs."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[…, n]`` → ``[…, N]``."""
        return self.bias.expand(*x.shape[:-1], -1)


class Discriminant(nn.Linear):
    """A router that is linear in a token's numbers and their magnitudes."""

    def __init__(self, width: int, outputs: int) -> None:
        """Of tokens of this width."""
        super().__init__(2 * width, outputs)

    @staticmethod
    def features(input: Tensor) -> Tensor:
        """``[…, n]`` → ``[…, 2 n]``."""
        return torch.cat([input, input.abs()], dim=-1)

    def forward(self, input: Tensor) -> Tensor:
        """``[…, n]`` → ``[…, N]``."""
        return super().forward(self.features(input))


def router(width: int, outputs: int, hidden: int) -> nn.Sequential:
    """``[…, width]`` → ``[…, outputs]`` of 2, 1 or no layers."""
    match hidden:
        case 0:
            return nn.Sequential(Constant(outputs))
        case 1:
            return nn.Sequential(nn.Linear(width, outputs))
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def named(layer: str, key: str) -> str:
    """The name of a layer's tensor; a network that is one layer has no name."""
    return f"{layer}.{key}" if layer else key


def linears(network: nn.Module, patches: bool = False) -> dict[str, nn.Linear]:
    """The linear layers of a network by the name of their weight in its state dict, less ``.weight``.

    Layers that are used twice are there once, and transformers' ``Conv1D`` is there as ``Turned``; with ``patches``,
    convolutions are there as ``Patches``.
    Raises LayoutError for PyTorch's own attention and transformer layers, which read their layers' weights past ``forward``.
    """
    for path, module in network.named_modules():
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise LayoutError(f"{path or 'the network'} is a torch.nn.{type(module).__name__}, whose layers cannot be routed")
    kinds = (nn.Linear, Turned, Patches) if patches else (nn.Linear, Turned)
    return {name: layer for name, layer in _linears(network) if type(layer) in kinds}


def _linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of any kind, with the names of ``linears``."""
    names: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name.removesuffix("weight").rstrip("."))
    for path, module in network.named_modules():
        if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
            module = Turned(module)
        elif Patches.are(module):
            module = Patches(module)
        if isinstance(module, nn.Linear):
            known = names[id(module.weight)]
            # a state dict may leave out a prefix that the path has, and a tied weight goes by several names
            yield next((name for name in known if path == name or path.endswith("." + name)), known[0]), module


def routed(network: nn.Module, layers: Mapping[str, Description], weights: Checkpoint) -> nn.Module:
    """The network with routed layers as they are described, in place, and with their experts from ``weights``.

    Experts need no gradient.  Raises LayoutError if the network has no such layer or the tensors have other shapes, and
    CheckpointError if they are missing.
    """
    if not layers:
        return network  # whatever layers it has
    known, new = linears(network, patches=True), dict[nn.Module, Routed]()
    padding, routers = Padding(), dict[str, nn.Module]()
    blocks = {str(about.get("block")): Shared(padding) for about in layers.values()}
    for name, about in layers.items():
        if name not in known:
            raise LayoutError(f"{weights.origin}: routes the layer {name!r}, but the network has {', '.join(known)}")
        linear = known[name]
        layer = _layer(linear, about, blocks, routers)
        new[module_of(linear)] = layer
        for key, expected in _missing(layer):
            _take(layer, key, expected, weights, named(name, key), linear)
        layer.about = dict(about)
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if path and module in new:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, new[module])
    if any("router" in about for about in layers.values()):
        padding.listen(network)
    for about in layers.values():
        if about.get("router", {}).get("ahead"):
            network.register_forward_pre_hook(LookAhead(blocks[str(about.get("block"))]), with_kwargs=True)
    return new.get(network, network)


Gate = LowRankExperts | MergedExperts


def gates(network: nn.Module) -> dict[str, Gate]:
    """The layers of a network that choose among the experts, for themselves or for their block, by name."""
    found = {name: layer for name, layer in _linears(network) if isinstance(layer, Gate)}
    return {name: layer for name, layer in found.items() if isinstance(layer, LowRankExperts) or layer.router is not None}


def described(network: nn.Module) -> dict[str, Description]:
    """What ``routed`` was told to make of the network's layers."""
    return {name: layer.about for name, layer in _linears(network) if isinstance(layer, Routed)}


def _layer(linear: nn.Linear, about: Description, blocks: Mapping[str, Shared], routers: dict[str, nn.Module]) -> Routed:
    """One layer on the device ``meta``.  Raises LayoutError for a description of something else."""
    match dict(about):
        case {"kind": "low_rank", "experts": int(n), "directions": int(d), "rank": int(r), "gate": int(gate), "top": int(top)}:
            return LowRankExperts(linear, n, d, r, gate, top)
        case {"kind": "low_rank", "experts": int(n), "rank": int(r), "block": str(block)}:
            return LowRankOfSample(linear, n, r, blocks[block], _router(linear, n, about, routers))
        case {"kind": "factored", "experts": int(n), "rank": int(r), "block": str(block)}:
            return FactoredExperts(linear, n, r, blocks[block], _router(linear, n, about, routers))
        case {"kind": "dense", "experts": int(n), "block": str(block)}:
            return DenseExperts(linear, n, blocks[block], _router(linear, n, about, routers))
        case {"kind": "sparse", "experts": int(n), "block": str(block), "counts": list(counts)} if all(
            isinstance(count, int) and count >= 0 for count in counts
        ):
            return SparseExperts(linear, n, blocks[block], _router(linear, n, about, routers), counts)
    raise LayoutError(f"no routed layer is described by {dict(about)}")


def _router(linear: nn.Linear, outputs: int, about: Description, routers: dict[str, nn.Module]) -> nn.Module | None:
    """The layer's router, if it has one: that of another layer if it is of the same name."""
    match about.get("router"):
        case None:
            return None
        case {"name": str(name), "hidden": int(hidden)}:
            if name not in routers:
                with torch.device("meta"):
                    routers[name] = router(linear.in_features, outputs, hidden).to(linear.weight.dtype)
            return routers[name]
        case {"kind": "discriminant"}:
            with torch.device("meta"):
                return Discriminant(linear.in_features, outputs).to(linear.weight.dtype)
    raise LayoutError(f"no router is described by {about['router']}")


def _missing(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors that are still on the device ``meta``."""
    yield from [(key, tensor) for key, tensor in layer.state_dict(keep_vars=True).items() if tensor.is_meta]


def _take(layer: nn.Module, key: str, expected: Tensor, weights: Checkpoint, name: str, like: nn.Linear) -> None:
    spec = weights.spec(name)
    if spec.shape != expected.shape:
        raise LayoutError(f"{weights.origin}: {name!r} is {spec}, where the description has {list(expected.shape)}")
    owner, _, leaf = key.rpartition(".")
    module = layer.get_submodule(owner)
    tensor = weights.read(name).to(device=like.weight.device, dtype=expected.dtype, copy=True)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if isinstance(expected, nn.Parameter) else tensor)
