"""Mixtures in folders: a ``config.json`` that says how the base's network is routed, and how that is loaded again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eutectic.checkpoint._files import read_json
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.spec import TensorSpec, require_same_layout
from eutectic.errors import CheckpointError, MissingDependencyError
from eutectic.fusion._routing import Description, described, routed
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


def filled(network: nn.Module, weights: Checkpoint) -> nn.Module:
    """The network with every tensor from a checkpoint, in place; of tied ones under one name.  Raises LayoutError."""
    state = network.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in state.items() if name in weights.specs}
    wanted = {name: tensor for name, tensor in state.items() if name in weights.specs or id(tensor) not in there}
    layout = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in wanted.items()}
    require_same_layout(layout, weights.specs, "the network", weights.origin, any_float=True)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights.read(name))
    return network


def load(folder: str | Path, backbone: nn.Module | None = None) -> nn.Module:
    """The network in a folder, in evaluation mode: a mixture of experts that Eutectic saved, or a plain model.

    ``backbone`` is a network of the base's architecture, which is used up; without one, transformers makes it from the
    config, of the class that ``architectures`` names.  The tensors are those of the folder, bit for bit.

    Raises CheckpointError, LayoutError for weights or layers that do not fit the network, MissingDependencyError.
    """
    folder = Path(folder)
    layers = layers_of(folder)
    with open_folder(folder) as weights:
        network = backbone if backbone is not None else _from_config(folder, bool(layers))
        return filled(routed(network, layers, weights), weights).eval()


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


def _from_config(folder: Path, mixture: bool) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            f"{folder}: transformers makes its network: pip install 'eutectic[text]', or give a `backbone`"
        ) from None
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: has no config.json that says what its network is; give a `backbone`")
    config = read_json(folder / "config.json")
    own = config.get("base_config") if mixture else config
    if not isinstance(own, dict) or "model_type" not in own:
        raise CheckpointError(f"{folder / 'config.json'}: says nothing of the base's network; give a `backbone`")
    try:
        parsed = transformers.AutoConfig.for_model(**own)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: transformers makes no network of it: {error}") from None
    named = (own.get("architectures") or [""])[0]
    kind = getattr(transformers, named, None) if named else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind._from_config(parsed)
    return transformers.AutoModel.from_config(parsed)
