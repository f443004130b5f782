"""From a recipe to a merge, and from a merge to a published folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from eutectic import record, registry
from eutectic.checkpoint.base import Checkpoint, fingerprint
from eutectic.checkpoint.folder import copy_side_files, model_card, open_path, provenance
from eutectic.checkpoint.writer import MAX_SHARD_BYTES, published, save_tensors
from eutectic.errors import RecipeError
from eutectic.merge.recipe import OverrideModel, Recipe
from eutectic.merge.view import Merged, Override

Progress = Callable[[str, int, int], None]  # what, done, total


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


def merged_from(recipe: Recipe, folder: Path = Path()) -> Merged:
    """Open what a recipe names, paths relative to ``folder``, and bind its method.  Raises as Merged does, and RecipeError."""
    if recipe.suite is not None:
        raise RecipeError(f"the recipe names the suite {recipe.suite!r}; it is opened by `eutectic`, not by the merge engine")
    base = _open(recipe.base, folder) if recipe.base else None
    experts = {name: _open(path, folder) for name, path in recipe.experts.items()}
    return bind(recipe, base, experts)


def bind(recipe: Recipe, base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> Merged:
    """A recipe's method over checkpoints that are open already."""
    overrides = [Override(o.match, o.parameters) for o in recipe.overrides]
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    return Merged(recipe.method, base, experts, recipe.parameters, overrides, dtype)


def _open(path: str, folder: Path) -> Checkpoint:
    local = folder / path
    return open_path(local if local.exists() else Path(path))


def save(
    checkpoint: Checkpoint,
    out: Path | str,
    *,
    replace: bool = False,
    recipe: Recipe | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> Path:
    """Write any checkpoint as a Hugging Face folder, whole or not at all.

    Beside the weights go the base's config and tokenizer files, a model card (``README.md``) with recipe and citation, and
    ``eutectic.json``: recipe, its hash, fingerprints of the inputs, versions.
    Raises OutputError if ``out`` exists and ``replace`` is not set, DiskFullError, NonFiniteError; then nothing is left behind.
    """
    out = Path(out)
    sources = _sources(checkpoint)
    folders = [folder for folder in map(_folder, sources.values()) if folder is not None]
    with published(out, replace=replace, inputs=folders) as folder:
        if isinstance(checkpoint, Merged):
            recipe = recipe or recipe_of(checkpoint)
        donor = _folder(next(iter(sources.values())))
        if donor is not None:
            dtypes = {spec.dtype for spec in checkpoint.specs.values() if spec.dtype.is_floating_point}
            copy_side_files(donor, folder, dtypes.pop() if len(dtypes) == 1 else None)
        with one_torch_thread():
            save_tensors(checkpoint, folder, max_shard_bytes=max_shard_bytes, progress=lambda *n: progress("merging", *n))
        inputs = {}
        for number, (name, source) in enumerate(sources.items()):
            progress("fingerprints of the inputs", number, len(sources))
            inputs[name] = {"origin": source.origin, "sha256": fingerprint(source)}
        about = {"eutectic": record.versions()["eutectic"], "inputs": inputs, "versions": record.versions()}
        if recipe is not None:
            about |= {"recipe": recipe.model_dump(mode="json"), "recipe_sha256": recipe.sha256()}
            (folder / "README.md").write_text(_card(out.name, recipe, sources), encoding="utf-8")
        (folder / "eutectic.json").write_text(provenance(about), encoding="utf-8")
    return out


def recipe_of(merged: Merged) -> Recipe:
    """The recipe that a merge made in Python amounts to; origins that are no paths stay as they are named."""
    return Recipe(
        method=merged.method,
        base=merged.base.origin if merged.base is not None else None,
        experts={name: expert.origin for name, expert in merged.experts.items()},
        parameters=merged.parameters,
        overrides=tuple(OverrideModel(match=o.match, parameters=dict(o.parameters)) for o in merged.overrides),
    )


def _sources(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The checkpoints that it was made of, the one whose config it keeps first."""
    if not isinstance(checkpoint, Merged):
        return {"source": checkpoint}
    return ({"base": checkpoint.base} if checkpoint.base is not None else {}) | checkpoint.experts


def _folder(checkpoint: Checkpoint) -> Path | None:
    path = Path(checkpoint.origin)
    return path if path.is_dir() else path.parent if path.is_file() else None


def _card(title: str, recipe: Recipe, sources: Mapping[str, Checkpoint]) -> str:
    return model_card(
        title=title,
        method=recipe.method,
        base_model=[recipe.base] if recipe.base else [],
        models=list(sources),  # by name: a card is published, and where files lay on one machine is nobody's business
        recipe=recipe.to_yaml(),
        citations=[registry.reference("methods", recipe.method)],
    )


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Chunks are spread over our own threads; torch's inside them would only compete."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
