"""What a router would see of a prompt: the base model run over it, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import CheckpointError, MissingDependencyError
from eutectic.methods._threads import one_torch_thread

EMBEDDING = "model.embed_tokens.weight"
#: prompts that go through the model together
BATCH = 32


def prompt_vectors(
    mode: str, base: Checkpoint, model: Path, tokenizer: Path, texts: Sequence[str], *, entering: bool = False
) -> dict[str, Tensor]:
    """The vectors of prompts in each layer, float32 ``[layers, width]``; one layer that stands for all under ``cheap_embed``.

    ``hidden…`` run the base, in float32 on the processor: the folder ``model`` gives its config, ``base`` its weights, and
    nothing of either is executed.  ``entering`` takes the residual stream that enters a layer, not its MLP block's input.
    ``cheap_embed`` leaves out the special tokens that the tokenizer adds to every prompt.
    Raises MissingDependencyError without transformers, CheckpointError for a prompt without tokens or one without a row.
    """
    ids = _token_ids(tokenizer, texts, base, specials=mode != "cheap_embed")
    if mode == "cheap_embed":
        sums = [_embedded(base, one).sum(0) for one in ids]
        return {text: (x / x.norm().clamp(min=1e-30))[None] for text, x in zip(texts, sums, strict=True)}
    found: list[Tensor] = []
    with one_torch_thread(), torch.inference_mode():
        decoder = _decoder(model)
        for at in range(0, len(ids), BATCH):
            found += _run(decoder, base, ids[at : at + BATCH], mode == "hidden_avg", entering)
    return dict(zip(texts, found, strict=True))


def _token_ids(folder: Path, texts: Sequence[str], base: Checkpoint, *, specials: bool) -> list[list[int]]:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise _missing() from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = [list(tokenizer(text, add_special_tokens=specials)["input_ids"]) for text in texts]
    except Exception as error:  # transformers' errors have no common base
        raise CheckpointError(f"{folder}: its tokenizer cannot be used: {_first_line(error)}") from error
    rows = base.spec(EMBEDDING).shape[0]
    for text, found in zip(texts, ids, strict=True):
        if not found:
            raise CheckpointError(f"{folder}: its tokenizer finds no token in the prompt {text!r}")
        if max(found) >= rows:
            raise CheckpointError(f"{folder}: its tokenizer has the id {max(found)}, and {EMBEDDING!r} only {rows} rows")
    return ids


def _embedded(base: Checkpoint, ids: Sequence[int]) -> Tensor:
    """Rows of the embedding, ``[tokens, width]``; only these are read."""
    rows = {i: base.read(EMBEDDING, slice(i, i + 1))[0].float() for i in dict.fromkeys(ids)}
    return torch.stack([rows[i] for i in ids])


def _decoder(model: Path) -> nn.Module:
    """The base's decoder without weights, embeddings and last norm."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise _missing() from None
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            decoder: Any = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)  # its buffers are in no checkpoint
    except Exception as error:  # transformers' errors have no common base
        raise CheckpointError(f"{model}: its config makes no model: {_first_line(error)}") from error
    decoder.norm = nn.Identity()
    return decoder.eval()


def _run(decoder: Any, base: Checkpoint, ids: Sequence[list[int]], average: bool, entering: bool) -> list[Tensor]:
    """The vectors of some prompts, ``[layers, width]`` each."""
    lengths = torch.tensor([len(one) for one in ids])
    # padding stands at the right, where no token of a causal model looks, and is left out of what is taken
    there = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    inputs = nn.utils.rnn.pad_sequence([_embedded(base, one) for one in ids], batch_first=True)
    taken: list[Tensor] = []

    def take(x: Tensor) -> None:
        if average:
            taken.append((x * there[..., None]).sum(1) / lengths[:, None])
        else:
            taken.append(x[torch.arange(len(ids)), lengths - 1].clone())

    hooks = []
    for i, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_pre_hook(_loading(base, f"model.layers.{i}.")))
        hooks.append(layer.register_forward_hook(_unload))
        if entering:
            hooks.append(layer.register_forward_pre_hook(lambda module, inputs: take(inputs[0])))
        else:
            hooks.append(layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, out: take(out)))
    try:
        decoder(inputs_embeds=inputs, attention_mask=there, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return list(torch.stack(taken, dim=1))


def _loading(base: Checkpoint, prefix: str) -> Callable[..., None]:
    def load(module: nn.Module, inputs: Any) -> None:
        weights = {name: base.read(f"{prefix}{name}").float() for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)

    return load


def _unload(module: nn.Module, inputs: Any, out: Any) -> None:
    module.to("meta")


def _missing() -> MissingDependencyError:
    return MissingDependencyError("gates from prompts need transformers: pip install 'eutectic[text]', or `gate_mode: random`")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0]}"
