"""Hugging Face folders: which file holds the weights, and what else belongs into the folder of a merged model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eutectic.checkpoint._files import inside, read_json
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.peft import CONFIG_FILE
from eutectic.checkpoint.safetensors import SafetensorsFile, Sharded
from eutectic.checkpoint.writer import explained
from eutectic.errors import CheckpointError, MissingDependencyError

_INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_ADVICE = "Pickles can run code and are never opened; convert the weights to safetensors first."

#: what a merged model takes over from its base, where there; no code and no weights are among it
SIDE_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
)


def open_path(path: str | Path) -> Checkpoint:
    """Open a folder, a PEFT folder (over the base that it names), a ``.safetensors`` file or its index.

    Raises CheckpointError if there is nothing of the kind at ``path``.
    """
    path = Path(path)
    if path.is_dir():
        return _open_adapter(path) if (path / CONFIG_FILE).exists() else open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder. Check the path.")
    if path.name.endswith(_INDEX):
        return Sharded(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: is a pickle. {PICKLE_ADVICE}")
    raise CheckpointError(f"{path}: is neither a folder nor a .safetensors file. Give one of these.")


def open_folder(path: str | Path) -> Checkpoint:
    """Open the safetensors weights of a model's folder: ``model.safetensors``, its index, or the only other such file.

    Raises CheckpointError if there are none, only pickles, or several candidates.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}. Check the path.")
    try:
        names = sorted(item.name for item in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    if CONFIG_FILE in names:
        raise CheckpointError(f"{folder}: is a PEFT adapter, not a model. Open it with open_path, or open_lora over its base.")
    name = _weights_file(folder, names)
    return (Sharded if name.endswith(_INDEX) else SafetensorsFile)(inside(folder, name))


def copy_side_files(source: str | Path, target: str | Path, dtype: torch.dtype | None = None) -> list[str]:
    """Copy config and tokenizer files (``SIDE_FILES``) from one folder to another; returns the names of those copied.

    Code is never copied, so ``auto_map``, which points to it, is dropped from the configs.  With ``dtype``, config.json says
    that the weights have it.  Raises CheckpointError for a link that leaves the folder, or a config that is not JSON.
    """
    source, target = Path(source), Path(target)
    copied = []
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            name = path.relative_to(source).as_posix()
            if not inside(source, name).is_file():
                continue
            with explained(target / name):
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target / name)
                if name.endswith("config.json"):
                    _rewrite_config(target / name, path, dtype if name == "config.json" else None)
            copied.append(name)
    return copied


def from_hub(repo_id: str, revision: str | None = None) -> Path:
    """Download the weights and configs of a Hugging Face repository; the folder of its snapshot.

    Raises MissingDependencyError without huggingface_hub, and CheckpointError if the repository cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError(
            f"{repo_id!r} is no local path, and hub ids need huggingface_hub: pip install 'eutectic[hub]'"
        ) from None
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        # "consolidated" files are a second copy of the weights, in another layout
        found = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"])
    except Exception as error:  # the hub client's errors have no common base
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"
        raise CheckpointError(f"{repo_id!r} is neither a local path nor reachable as a hub id ({reason})") from error
    return Path(found)


def model_card(
    *,
    title: str,
    method: str,
    base_model: Sequence[str],
    models: Sequence[str],
    recipe: str,
    citations: Sequence[str] = (),
    library_name: str = "transformers",
) -> str:
    """The README.md of a merged model, with the front matter that the Hugging Face hub reads; ``recipe`` is YAML."""
    front = ["---", f"library_name: {json.dumps(library_name)}", "tags:", "- merge", "- eutectic"]
    if base_model:  # JSON strings are YAML strings, whatever is in them
        front += ["base_model:", *(f"- {json.dumps(name, ensure_ascii=False)}" for name in base_model)]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe)), default=0))
    body = [
        "---",
        "",
        f"# {title}",
        "",
        f"Merged with Eutectic by `{method}` from:",
        "",
        *(f"- `{name}`" for name in models),
        "",
    ]
    body += ["## Recipe", "", f"{fence}yaml", recipe.rstrip("\n"), fence]
    if citations:
        body += ["", "## Citation", "", *(f"- {citation}" for citation in citations)]
    return "\n".join([*front, *body]) + "\n"


def provenance(record: Mapping[str, Any]) -> str:
    """The text of ``eutectic.json``: where every byte of the output came from."""
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


# ── which file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _weights_file(folder: Path, names: list[str]) -> str:
    indexes = [name for name in names if name.endswith(_INDEX)]
    singles = [name for name in names if name.endswith(".safetensors")]
    chosen = [name for name in indexes if name == f"model{_INDEX}"] or [name for name in singles if name == "model.safetensors"]
    chosen = chosen or indexes or singles
    if len(chosen) == 1:
        whole = chosen[0].removesuffix(_INDEX) + ".safetensors"
        if chosen[0].endswith(_INDEX) and whole in names:
            raise CheckpointError(
                f"{folder}: has both {chosen[0]} and {whole}. Remove one, or open the one you mean by its path."
            )
        return chosen[0]
    if chosen:
        listed = ", ".join(chosen[:5]) + (" …" if len(chosen) > 5 else "")
        raise CheckpointError(f"{folder}: holds {len(chosen)} candidates ({listed}). Open the one you mean by its own path.")
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(f"{folder}: holds only pickled weights ({pickles[0]}). {PICKLE_ADVICE}")
    raise CheckpointError(f"{folder}: {'holds no .safetensors file' if names else 'is empty'}. Check the path.")


def _open_adapter(folder: Path) -> Checkpoint:
    """A PEFT folder over its base; nothing is downloaded."""
    base = adapter_base(folder)
    if base is None:
        named = read_json(inside(folder, CONFIG_FILE)).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: its base {named!r} is no local path. Download it (from_hub), and open the adapter with open_lora over "
            "it, or name it as the `base` of a recipe."
        )
    return open_lora(folder, open_folder(base) if base.is_dir() else open_path(base))


def adapter_base(folder: Path) -> Path | None:
    """The base that a PEFT folder names: beside the adapter if it is there, else a path as it stands; None if neither is.

    Raises CheckpointError if it names none.
    """
    named = read_json(inside(folder, CONFIG_FILE)).get("base_model_name_or_path")
    if not isinstance(named, str) or not named or "\0" in named:
        raise CheckpointError(f"{folder}: its {CONFIG_FILE} names no base. Open it with open_lora over its base.")
    return next((base for base in (folder / named, Path(named)) if _exists(base)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a hub id that is too long for a file name
        return False


# ── configs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rewrite_config(target: Path, source: Path, dtype: torch.dtype | None) -> None:
    """Drop ``auto_map`` and set the dtype; a config that needs neither keeps its bytes."""
    config = read_json(source)
    wanted = {key: value for key, value in config.items() if key != "auto_map"}
    if dtype is not None:
        wanted = _with_dtype(wanted, str(dtype).removeprefix("torch."))
    if wanted != config:
        target.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """``dtype`` and ``torch_dtype``, in the config and in the configs within it (``text_config`` …), set to ``dtype``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            found[key] = dtype
        else:
            found[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return found
