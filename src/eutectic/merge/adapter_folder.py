"""Adapters as PEFT folders, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic import record, registry
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.folder import model_card, provenance
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.peft import CONFIG_FILE, WEIGHTS_FILE, Adapter, config_of
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.save import Progress, save_file, silent, tensor_hashes, tensor_norms
from eutectic.merge.adapters import Fused
from eutectic.merge.recipe import AnyRecipe
from eutectic.methods._threads import one_torch_thread


def save_adapter(
    fused: Fused,
    out: Path | str,
    *,
    replace: bool = False,
    recipe: AnyRecipe | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Path:
    """Write a fused adapter as a PEFT folder, with a model card and ``eutectic.json``, which says what a rank left out.

    The base is named as the first adapter names it.  Raises OutputError if ``out`` exists and ``replace`` is not set, and
    NonFiniteError.
    """
    out = Path(out)
    first = next(iter(fused.adapters.values()))
    ranks = {name: fused.rank_of(name) for name in fused.targets}
    config = config_of(ranks, first.config | {"base_model_name_or_path": _base_seen_from(out, first)}, fused.replaced)
    inputs = {f"experts.{name}": {"origin": c.origin, "blake3": fingerprint(c)} for name, c in fused.inputs.items()}
    said = {"recipe": recipe.as_data(), "recipe_sha256": recipe.sha256()} if recipe is not None else {}
    card = model_card(
        title=out.name,
        method=fused.method,
        base_model=[named] if (named := config.get("base_model_name_or_path")) else [],
        models=fused.experts,
        recipe=recipe.to_yaml() if recipe is not None else fused.origin,
        citations=[registry.reference("methods", fused.method)],
        library_name="peft",
    )
    files = [file.parent for file in fused.files]
    with published(out, replace=replace, inputs=files) as folder:
        about = write_adapter(fused, config, folder, threads, progress)
        about |= {"inputs": inputs, "truncation_error": fused.error} | said
        (folder / "eutectic.json").write_text(provenance(about), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def write_adapter(
    factors: Checkpoint, config: Mapping[str, Any], folder: Path, threads: int | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Write config and tensors into an existing folder; what its ``eutectic.json`` is to say of them."""
    with one_torch_thread():
        threads = threads or len(os.sched_getaffinity(0))
        leaves = save_file(factors, folder / WEIGHTS_FILE, threads=threads, progress=progress)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"versions": record.versions(record.ENGINE), "blake3": tensor_hashes(leaves), "norms": tensor_norms(leaves)}


def _base_seen_from(out: Path, adapter: Adapter) -> str | None:
    """The base as the adapter names it; a path that begins at the adapter's folder, as it is seen from ``out``."""
    named = adapter.base_name
    if named is None or Path(named).is_absolute() or "\0" in named or not (adapter.folder / named).exists():
        return named
    return os.path.relpath((adapter.folder / named).resolve(), out.resolve())
