"""Mixtures in folders: a ``config.json`` that says how the base's network is routed, and how that is loaded again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from eutectic.checkpoint._files import read_json
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.spec import TensorSpec, require_same_layout
from eutectic.checkpoint.views import Rename
from eutectic.errors import CheckpointError, MissingDependencyError
from eutectic.fusion._routed import Description
from eutectic.fusion._routing import described, routed
from eutectic.merge import run
from eutectic.merge.api import Source, open

MODEL_TYPE = "eutectic_mixture"


def mixture_config(config: Mapping[str, Any], layers: Mapping[str, Description]) -> dict[str, Any]:
    """The config of a mixture over a network with this config, which goes into it as ``base_config``."""
    own = {"model_type": MODEL_TYPE, "architectures": config.get("architectures"), "layers": dict(layers)}
    dtypes = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    return own | dtypes | {"base_config": dict(config)}


def layers_of(folder: Path) -> dict[str, Description]:
    """Which layers of a folder's network are routed; none if it holds a plain model.  Raises CheckpointError."""
    if not (folder / "config.json").exists():
        return {}
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        return {}
    match config.get("layers"):
        case dict() as layers if all(isinstance(about, dict) for about in layers.values()):
            return layers
    raise CheckpointError(f"{folder / 'config.json'}: a mixture whose config has no `layers`; save it anew")


def filled(network: nn.Module, weights: Checkpoint, layers: Mapping[str, Description] = MappingProxyType({})) -> nn.Module:
    """The network with these layers routed and every tensor from a checkpoint, in place; of tied ones under one name.

    Raises LayoutError, and CheckpointError for experts that are missing.
    """
    own = set(network.state_dict())
    network = routed(network, layers, weights)
    state = network.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in state.items() if name in weights.specs}
    wanted = {name: tensor for name, tensor in state.items() if name in weights.specs or id(tensor) not in there}
    layout = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in wanted.items()}
    require_same_layout(layout, weights.specs, "the network", weights.origin, any_float=True)
    with torch.no_grad():
        for name in wanted.keys() & own:  # the routed layers have taken the rest
            wanted[name].copy_(weights.read(name))
    return network


def load(folder: str | Path, backbone: nn.Module | None = None) -> nn.Module:
    """The network in a folder, in evaluation mode: a mixture of experts that Eutectic saved, or a plain model.

    ``backbone`` is a network of the base's architecture, which is used up; without one, transformers makes it from the
    config, of the class that ``architectures`` names.  The tensors are those of the folder, bit for bit.

    Raises CheckpointError, LayoutError for weights or layers that do not fit the network, MissingDependencyError.
    """
    folder = Path(folder)
    layers = layers_of(folder)
    if backbone is None and not layers:
        return _maker(folder, read_json(folder / "config.json")).from_pretrained(folder).eval()
    with open_folder(folder) as weights:
        if backbone is not None:
            return filled(backbone, weights, layers).eval()
        network = _from_config(folder)
        names = _names_in_files(network)
        renamed = {layer: names.get(f"{layer}.weight", f"{layer}.weight").removesuffix(".weight") for layer in layers}
        known = {name: names[name] for name in weights.specs if name in names}
        for layer, path in renamed.items():
            known |= {name: path + name[len(layer) :] for name in weights.specs if name.startswith(f"{layer}.")}
        view = Rename(weights, known)
        return filled(network, view, {renamed[layer]: about for layer, about in layers.items()}).eval()


def save(source: Source, out: str | Path, **options: Any) -> Path:
    """Write a checkpoint, or a network with its routed layers, as a Hugging Face folder, whole or not at all.

    Of a mixture that ``fuse`` made of transformers' classes, the config goes along.  Options and errors: see
    ``eutectic.merge.run.save``.
    """
    if not isinstance(source, nn.Module):
        return run.save(open(source), out, **options)
    layers, transformers = described(source), sys.modules.get("transformers")
    known = transformers is not None and isinstance(source, transformers.PreTrainedModel)
    config = source.config.to_dict() if known else {}

    def attach(folder: Path) -> None:
        said = mixture_config(config, layers) if layers else config
        (folder / "config.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    return run.save(_untied(source), out, attach=attach if layers or known else lambda folder: None, **options)


def _untied(network: nn.Module) -> Memory:
    """A network's tensors, each under the first of its names."""
    state = network.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return Memory({name: state[name] for name in state if first[id(state[name])] == name}, type(network).__name__)


def _maker(folder: Path, config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config names, or ``AutoModel``.  Raises MissingDependencyError."""
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            f"{folder}: transformers makes its network: pip install 'eutectic[text]', or give a `backbone`"
        ) from None
    named = (config.get("architectures") or [""])[0]
    kind = getattr(transformers, named, None) if named else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else transformers.AutoModel


def _from_config(folder: Path) -> Any:
    """A network of the class of a mixture's base, untrained."""
    config = read_json(folder / "config.json").get("base_config")
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{folder / 'config.json'}: says nothing of the base's network; give a `backbone`")
    maker = _maker(folder, config)
    import transformers

    try:
        parsed = transformers.AutoConfig.for_model(**config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: transformers makes no network of it: {error}") from None
    return maker.from_config(parsed) if maker is transformers.AutoModel else maker._from_config(parsed)


def _names_in_files(network: Any) -> dict[str, str]:
    """The names that transformers' own files have for a network's tensors → those in its state dict, where they differ.

    Transformers renames tensors as it loads and saves them, and says how only by doing so: here, to numbers.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = list(network.state_dict())
    saved = revert_weight_conversion(network, {name: torch.tensor([number]) for number, name in enumerate(own)})
    found = {name: own[int(number)] for name, number in saved.items() if number.numel() == 1}
    return {name: path for name, path in found.items() if name != path}
