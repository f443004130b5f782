"""Networks that turn inputs into features, made from a Hugging Face config and filled from any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from eutectic.bench.vit import ViT
from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import CheckpointError, MissingDependencyError
from eutectic.fusion._folder import filled
from eutectic.fusion._routed import Description


class MeanPooled(nn.Module):
    """Token ids ``[B, L]``, 0 = padding → the mean of the last hidden states over the real tokens, ``[B, width]``."""

    def __init__(self, encoder: nn.Module) -> None:
        """Wrap a transformers encoder."""
        super().__init__()
        self.encoder = encoder

    def forward(self, ids_BL: Tensor) -> Tensor:
        """See the class."""
        ids_BL = ids_BL[:, : max(1, int((ids_BL != 0).sum(1).max()))]  # padding shared by the whole batch costs nothing
        mask = ids_BL != 0
        hidden = self.encoder(input_ids=ids_BL, attention_mask=mask.long()).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The encoder's own, so that names are those of its folder."""
        return self.encoder.state_dict(*args, **kwargs)


def _bert(config: Mapping[str, Any], pooling: str) -> nn.Module:
    if pooling != "mean":
        raise CheckpointError(f"features of a BERT are the mean over its tokens, not {pooling!r}")
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        raise MissingDependencyError("text models need transformers: pip install 'eutectic[text]'") from None
    return MeanPooled(BertModel(BertConfig(**config)))


BUILDERS: dict[str, Callable[[Mapping[str, Any], Any], nn.Module]] = {"dinov2": ViT, "bert": _bert}


def backbone(
    config_file: Path, weights: Checkpoint, pooling: str, layers: Mapping[str, Description] = MappingProxyType({})
) -> nn.Module:
    """An evaluation-mode network with these weights; ``pooling`` ("cls" or "mean") says which tokens are the features.

    ``layers`` describes those that are routed, if there are any.

    Raises CheckpointError for a config that is missing or of an unknown ``model_type``, LayoutError if the weights do not fit.
    """
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file}: cannot be read: {error}") from None
    build = BUILDERS.get(config.get("model_type"))
    if build is None:
        raise CheckpointError(f"{config_file}: model_type {config.get('model_type')!r} is none of {', '.join(BUILDERS)}")
    return filled(build(config, pooling), weights, layers).eval()
