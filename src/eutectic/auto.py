"""Lets transformers load mixtures: after ``import eutectic.auto`` its auto classes know the folders that Eutectic saves.

No code comes with a folder.  What is loaded is of the class that the base's config names, with its layers routed, whichever
auto class is asked.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from eutectic.errors import CheckpointError
from eutectic.fusion._folder import MODEL_TYPE, load


class MixtureConfig(PretrainedConfig):
    """The config of a mixture: ``layers``, which are routed, and ``base_config``."""

    model_type = MODEL_TYPE


class MixtureModel(PreTrainedModel):
    """What the auto classes find; it makes networks of the base's class and has no instances."""

    config_class = MixtureConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """The network in a local folder, as ``load`` gives it; the one option is ``dtype``.  Raises CheckpointError."""
        path = pretrained_model_name_or_path
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        wanted = {key: value for key, value in options.items() if key not in ("config", "adapter_kwargs", *_HUB) and value}
        if args or wanted:
            raise CheckpointError(f"{path}: a mixture is loaded as it is; these options are not known: {', '.join(wanted)}")
        network = load(path)
        return network if dtype in (None, "auto") else network.to(dtype)


_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "code_revision",
    "_commit_hash",
    "_from_auto",
)

AutoConfig.register(MODEL_TYPE, MixtureConfig)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification):
    _auto.register(MixtureConfig, MixtureModel)
