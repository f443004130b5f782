"""RegMean++: RegMean block after block, on the inputs that the blocks merged before make."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._grams import Unit, fitted, layers_of
from eutectic.fusion._tensors import over_average
from eutectic.merge.slices import place_of, stacks_of
from eutectic.methods._method import Count, Fraction
from eutectic.task import Task

REFERENCE = "Nguyen et al., RegMean++, TMLR 2026, arXiv:2508.03121"


def regmean_plusplus(samples: Count = 256, shrink: Fraction = 0.9, batch_size: Count = 32) -> Fusion:
    """Merge each linear layer by least squares on the inputs that it has in the merged network, block after block.

        W = (Σₖ Wₖ Gₖ) (Σₖ Gₖ)⁻¹,     Gₖ = E x xᵀ over tokens, its off-diagonal entries times α

    where x has come through the merged blocks below, and expert k's own block up to the layer.  Blocks are found by their
    numbers in the modules' names; a linear layer outside them is a block of its own.  All else is averaged, as in ``regmean``.

    Args:
        samples: inputs of each task, at most.
        shrink: α; 1 is plain least squares, 0 an average of columns by their inputs' energy.
        batch_size: inputs that are run together.

    A forward pass is begun anew for each block, and ends with it: B blocks cost (B + 1) / 2 times the passes of ``regmean``.
    The memory is that of the network, and for one block one expert's Gram matrices, and their sum with Σ Wₖ Gₖ.
    Raises NonFiniteError naming the task and layer.

    Source: Nguyen et al., TMLR 2026, arXiv:2508.03121.  Differs from the paper in that what follows the blocks is merged
    too, and as ``regmean`` does.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        return fitted(models, tasks, run, blocks, samples=samples, shrink=shrink, batch_size=batch_size)

    return Fusion(fit, over_average)


def blocks(network: nn.Module, names: Mapping[int, Sequence[str]], run_once: Callable[[], object]) -> list[Unit]:
    """Blocks, and linear layers outside them, in the order in which a forward pass first comes to them.

    A tensor that several share is the first one's; what is also used outside is no block's.
    """
    layers = layers_of(network, names)
    modules = dict(network.named_modules())
    linear = {module for layer in layers for module in layer.modules}
    stacks = stacks_of(name for name, _ in network.named_parameters())
    paths = dict.fromkeys(_block(path, stacks) for path, module in modules.items() if module in linear)
    calls: collections.Counter[str] = collections.Counter()  # in the order of the first calls
    handles = [modules[path].register_forward_pre_hook(_counted(calls, path)) for path in paths]
    try:
        run_once()
    finally:
        for handle in handles:
            handle.remove()
    inside = {module for path in calls for module in modules[path].modules()}
    taken = {key for module in network.modules() if module not in inside for key in _tensors(module, recurse=False)}
    found = []
    for path, count in calls.items():
        mine = (_tensors(modules[path], recurse=True) & names.keys()) - taken
        taken |= mine
        within = set(modules[path].modules())
        held = [
            layer._replace(modules=tuple(module for module in layer.modules if module in within))
            for layer in layers
            if id(layer.modules[0].weight) in mine
        ]
        if held:
            found.append(Unit(modules[path], held, frozenset(name for key in mine for name in names[key]), count == 1))
    return found


def _block(path: str, stacks: Mapping[str, object]) -> str:
    place = place_of(f"{path}.weight")
    return f"{place.stack}.{place.index}" if place and place.stack in stacks else path


def _counted(calls: collections.Counter[str], path: str) -> Callable[..., None]:
    def hook(*_: object) -> None:
        calls[path] += 1

    return hook


def _tensors(module: nn.Module, *, recurse: bool) -> set[int]:
    return {id(tensor) for tensor in (*module.parameters(recurse), *module.buffers(recurse))}
