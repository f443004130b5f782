"""From a recipe to a merge, and from a merge to a published folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eutectic import record, registry
from eutectic.checkpoint.aligned import aligned, vocabulary_tensors
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.chat import write_chat_template
from eutectic.checkpoint.folder import adapter_base, copy_side_files, model_card, open_path, provenance
from eutectic.checkpoint.hashed import Hashed
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.peft import CONFIG_FILE, open_adapter
from eutectic.checkpoint.publish import resumable
from eutectic.checkpoint.save import Progress, save_tensors, silent, tensor_hashes, tensor_norms
from eutectic.checkpoint.tokenizer import VOCABULARY_FILES
from eutectic.checkpoint.views import Repaired
from eutectic.checkpoint.writer import MAX_SHARD_BYTES
from eutectic.errors import CheckpointError, ParameterError, RecipeError
from eutectic.merge._memory import keep_freed_memory
from eutectic.merge.adapter_folder import save_adapter
from eutectic.merge.adapters import Fused
from eutectic.merge.cluster import save_tensors as save_on_cluster
from eutectic.merge.compose import Composed, Outcome
from eutectic.merge.plan import plan
from eutectic.merge.recipe import AnyRecipe, Dtype, OverrideModel, Recipe
from eutectic.merge.slices import relayered
from eutectic.merge.view import Merged, Override
from eutectic.merge.vocabularies import TokenizerSpec, align, chat_template, require_one_vocabulary, tokenizer_of
from eutectic.methods._threads import one_torch_thread

if TYPE_CHECKING:
    from eutectic.merge.mergekit import MergekitRecipe

#: torch's dtypes in the words of a recipe
DTYPE_WORDS: dict[torch.dtype, Dtype] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def merged_from(recipe: Recipe | MergekitRecipe, folder: Path = Path()) -> Merged | Composed | Fused:
    """Open what a recipe names, paths relative to ``folder``, and bind its method.  Raises as Merged does, and RecipeError."""
    if not isinstance(recipe, Recipe):
        return recipe.open(folder)
    if recipe.suite is not None:
        raise RecipeError(f"the recipe names the suite {recipe.suite!r}; it is opened by `eutectic`, not by the merge engine")
    if recipe.is_ensemble:
        raise RecipeError(f"{recipe.method} combines predictions: `eutectic fuse` runs the recipe")
    if recipe.is_fitted:
        raise RecipeError(f"{recipe.method} is fitted to data: `eutectic fuse` does so, or names an `artefact`")
    if recipe.output is not None:
        return _fused(recipe, folder)
    base, experts = opened(recipe, folder)
    if recipe.tokenizer is not None or recipe.chat_template is not None:
        return _spoken(recipe, ({"base": base} if base is not None else {}) | experts)
    merged = bind(recipe, base, experts)
    if vocabulary_tensors(merged.specs):
        require_one_vocabulary({name: tokenizer_of(model) for name, model in merged.inputs.items()})
    return merged


def _fused(recipe: Recipe, folder: Path) -> Fused:
    """An adapter of adapters."""
    base = _open(recipe.base, folder) if recipe.base else None
    adapters = {name: open_adapter(local(path, folder)) for name, path in recipe.experts.items()}
    dtype, space = getattr(torch, recipe.dtype) if recipe.dtype else None, recipe.space or "core"
    overrides = [Override(o.match, o.parameters) for o in recipe.overrides]
    return Fused(
        recipe.method, adapters, recipe.bound_parameters(), overrides, base=base, space=space, rank=recipe.rank, dtype=dtype
    )


def opened(recipe: Recipe, folder: Path) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """The base and the experts that a recipe names by path; an adapter whose base is not here is one of the recipe's."""
    base = _open(recipe.base, folder) if recipe.base else None

    def expert(path: Path) -> Checkpoint:
        if base is not None and (path / CONFIG_FILE).exists() and adapter_base(path) is None:
            return open_lora(path, base)
        return open_path(path)

    return base, {name: expert(local(path, folder)) for name, path in recipe.experts.items()}


def _spoken(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Composed:
    """A merge whose recipe says something of the tokenizer or the chat template; ``models`` has the base as ``base``."""
    tokenizers, base = {name: tokenizer_of(model) for name, model in models.items()}, "base" if recipe.base else None
    first = next(iter(models), "")
    tokenizer, alignment = tokenizers.get(first), None
    if recipe.tokenizer is not None:
        tokenizer, alignment = align(TokenizerSpec(**dict(recipe.tokenizer)), tokenizers, base)
    template = chat_template(recipe.chat_template, tokenizers, base) if recipe.chat_template is not None else None

    def build(inputs: Mapping[str, Checkpoint]) -> Outcome:
        views = aligned(inputs, alignment) if alignment is not None else inputs
        merged = bind(recipe, views["base"] if base else None, {name: views[name] for name in recipe.experts})
        return Outcome(merged, first, {}, tokenizer)

    composed = Composed(models, build, method=recipe.method, chat_template=template)
    if recipe.chat_template is not None and template is None:
        composed.notes = ("no model has a chat template, so the output has none",)
    if alignment is not None:
        composed.notes += alignment.notes
    elif vocabulary_tensors(composed.specs):
        require_one_vocabulary(tokenizers)
    return composed


def bind(recipe: Recipe, base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> Merged:
    """A recipe's method over checkpoints that are open already."""
    overrides = [Override(o.match, o.parameters) for o in recipe.overrides]
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    return Merged(recipe.method, base, experts, recipe.bound_parameters(), overrides, dtype)


def _open(path: str, folder: Path) -> Checkpoint:
    return open_path(local(path, folder))


def local(path: str, folder: Path) -> Path:
    """A path of a recipe: relative to the recipe's folder, or as it is if nothing is there."""
    return folder / path if (folder / path).exists() else Path(path)


def save(
    checkpoint: Checkpoint,
    out: Path | str,
    *,
    replace: bool = False,
    recipe: AnyRecipe | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int | None = None,
    memory_bytes: int | None = None,
    cluster: str | None = None,
    repair: bool = False,
    progress: Progress = silent,
    attach: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write any checkpoint as a Hugging Face folder, whole or not at all.

    Beside the weights go the base's config and tokenizer files, a model card (``README.md``) with recipe and citation, and
    ``eutectic.json``: recipe, its hash, hashes of inputs and output, versions.  A run that was killed or stopped is carried on
    by the same call, if the inputs are files.  The whole process takes at most ``memory_bytes``, see ``plan``; ``threads`` is
    the number of processors by default.  With ``cluster``, the address of a Ray cluster, its machines do the work, and
    ``memory_bytes`` is for each of their processes: see ``merge.cluster``.  With ``repair``, entries of an input that are
    NaN or Inf are taken from the base (without one, the first expert), and as 0 in that itself; ``eutectic.json`` counts them.
    A fused adapter becomes a PEFT folder, see ``save_adapter``.
    ``attach`` is called with the folder before it appears, to put further files there.
    Raises OutputError if ``out`` exists and ``replace`` is not set, BudgetError, DiskFullError, NonFiniteError; then nothing is
    left behind, but for a disk that fills up half-way, or machines that are lost (ClusterError): what was written stays beside
    ``out``, for the same call to carry on.
    """
    if isinstance(checkpoint, Fused):
        if repair or cluster is not None or memory_bytes is not None:
            raise ParameterError(
                "an adapter is merged as it is, on one machine: leave out `repair`, `cluster` and `memory_bytes`"
            )
        return save_adapter(checkpoint, out, replace=replace, recipe=recipe, threads=threads, progress=progress)
    out, budget_bytes = Path(out), math.inf
    repaired: dict[str, Repaired] = {}
    threads = threads or len(os.sched_getaffinity(0))
    if isinstance(checkpoint, (Merged, Composed)):
        if isinstance(checkpoint, Merged):
            recipe = recipe or recipe_of(checkpoint)
        checkpoint = checkpoint.through(Hashed)
        sources = checkpoint.inputs
        if repair:
            if cluster is not None:
                raise ParameterError("repairing counts what it finds, on one machine: leave out `cluster` or `repair`")
            reference = next(iter(sources.values()))
            checkpoint = checkpoint.through(lambda input_: Repaired(input_, reference))
            repaired = {name: view for name, view in checkpoint.inputs.items() if isinstance(view, Repaired)}
        budget_bytes = plan(checkpoint, memory_bytes, threads if cluster is None else 1).work_bytes
    else:
        sources = {"source": checkpoint}
    with resumable(out, _key(checkpoint, recipe, max_shard_bytes, repair), replace=replace, inputs=_precious(checkpoint)) as (
        folder,
        journal,
    ):
        donor = sources[checkpoint.donor] if isinstance(checkpoint, Composed) else next(iter(sources.values()))
        _write_side_files(checkpoint, donor, folder)
        keep_freed_memory()
        with one_torch_thread():
            options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "journal": journal, "progress": progress}
            if cluster is None:
                leaves = save_tensors(checkpoint, folder, threads=threads, budget_bytes=budget_bytes, **options)
            else:
                leaves = save_on_cluster(checkpoint, folder, address=cluster, memory_bytes=memory_bytes, **options)
        about: dict[str, Any] = {"versions": record.versions(record.ENGINE), "inputs": _inputs(sources)}
        about |= {"blake3": tensor_hashes(leaves), "norms": tensor_norms(leaves)}
        if repair:
            about["repaired"] = {name: view.counts() for name, view in repaired.items()}
        if recipe is not None:
            about |= {"recipe": recipe.as_data(), "recipe_sha256": recipe.sha256()}
            (folder / "README.md").write_text(_card(out.name, recipe, checkpoint, sources), encoding="utf-8")
        (folder / "eutectic.json").write_text(provenance(about), encoding="utf-8")
        attach(folder)
    return out


def verify(folder: Path) -> list[str]:
    """Hash the tensors of a folder again; one line for each that is not what ``eutectic.json`` says, none if all are.

    Raises CheckpointError if the folder has no such file, or it is not one of ours.
    """
    path = folder / "eutectic.json"
    try:
        expected: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["blake3"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no provenance written by eutectic: {error}") from None
    weights = Hashed(open_adapter(folder).file if (folder / CONFIG_FILE).exists() else open_path(folder))
    lines = [f"{name}: missing" for name in expected if name not in weights.specs]
    for name in weights.specs:
        if name not in expected:
            lines.append(f"{name}: not in {path.name}")
        elif weights.tensor_hash(name) != expected[name]:
            lines.append(f"{name}: changed since it was written")
    return lines


def _write_side_files(checkpoint: Checkpoint, donor: Checkpoint, folder: Path) -> None:
    """Config, tokenizer and chat template of an output: the donor's, but for what the merge changes."""
    if donor.files:
        dtypes = {spec.dtype for spec in checkpoint.specs.values() if spec.dtype.is_floating_point}
        # an adapter's files come before those of the model that it adapts
        copy_side_files(donor.files[-1].parent, folder, dtypes.pop() if len(dtypes) == 1 else None)
    composed = checkpoint if isinstance(checkpoint, Composed) else None
    path = folder / "config.json"
    if composed is not None and (path.exists() or composed.mixture is not None):
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        changed, _ = relayered(config, composed.layers)
        if composed.mixture is not None:
            changed = composed.mixture.config(changed)
        if changed != config:
            text = json.dumps(changed, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
    tokenizer = composed.tokenizer if composed is not None else tokenizer_of(donor)
    if tokenizer is not None:
        tokenizer.write(folder)
    if composed is not None and composed.chat_template is not None:
        write_chat_template(composed.chat_template, folder)


def _precious(checkpoint: Checkpoint) -> set[Path]:
    """What an output must not touch: the folders of models, and files that lie about by themselves."""
    owned = ("config.json", "adapter_config.json")
    return {file.parent if any((file.parent / name).exists() for name in owned) else file for file in checkpoint.files}


def _key(checkpoint: Checkpoint, recipe: AnyRecipe | None, max_shard_bytes: int, repair: bool = False) -> str:
    """What an unfinished output must agree in to be carried on; inputs that are no files are never the same twice."""
    read = list(checkpoint.files)
    if isinstance(checkpoint, Composed):  # where a row comes from may depend on these
        folders = dict.fromkeys(file.parent for file in read)
        read += [folder / name for folder in folders for name in VOCABULARY_FILES if (folder / name).is_file()]
    files = [(str(f.absolute()), (s := f.stat()).st_size, s.st_mtime_ns) for f in read]
    leaves = checkpoint.inputs.values() if isinstance(checkpoint, (Merged, Composed)) else [checkpoint]
    identity = files if all(leaf.durable for leaf in leaves) else secrets.token_hex(16)
    said = recipe.canonical_json() if recipe else ""
    if isinstance(checkpoint, Composed):
        said += checkpoint.identity
    layout, versions = dict(checkpoint.specs), record.versions(record.ENGINE)
    return hashlib.sha256(repr((identity, said, layout, max_shard_bytes, repair, versions)).encode()).hexdigest()


def _inputs(sources: Mapping[str, Checkpoint]) -> dict[str, dict[str, str]]:
    """Where each input came from and what was in it; one that the method did not read has no hash."""
    found = {}
    for name, source in sources.items():
        hashed = source if isinstance(source, Hashed) else Hashed(source)
        found[name] = {"origin": source.origin, "blake3": "" if hashed.untouched() else hashed.fingerprint()}
    return found


def recipe_of(merged: Merged) -> Recipe:
    """The recipe that a merge made in Python amounts to; origins that are no paths stay as they are named."""
    return Recipe(
        method=merged.method,
        base=merged.base.origin if merged.base is not None else None,
        experts={name: expert.origin for name, expert in merged.experts.items()},
        parameters=merged.parameters,
        dtype=DTYPE_WORDS.get(merged.dtype) if merged.dtype is not None else None,
        overrides=tuple(OverrideModel(match=o.match, parameters=dict(o.parameters)) for o in merged.overrides),
    )


def _card(title: str, recipe: AnyRecipe, checkpoint: Checkpoint, sources: Mapping[str, Checkpoint]) -> str:
    ran = [merged.method for merged in checkpoint.merges] if isinstance(checkpoint, Composed) else []
    known = {name for room in registry.ROOMS for name in registry.names(room)}
    return model_card(
        title=title,
        method=", ".join(recipe.methods),
        base_model=recipe.base_models,
        models=list(sources),  # by name: a card is published, and where files lay on one machine is nobody's business
        recipe=recipe.to_yaml(),
        citations=list(dict.fromkeys(_citation(name) for name in (*recipe.methods, *ran) if name in known)),
    )


def _citation(method: str) -> str:
    return registry.reference(registry.room_of(method), method)
