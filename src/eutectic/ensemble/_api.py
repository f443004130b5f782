"""Combining parties: from Python, from a recipe, and as a folder that can be loaded again.

config.json                  the rule, its parameters, the classes, and the parties in order
parties/0 …                  as each handed itself over, or as calibration left it
combination/model.safetensors    what the rule was fitted to, if it was
eutectic.json                recipe, hashes of the inputs, versions
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eutectic import record
from eutectic.checkpoint._files import read_json
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import model_card, open_folder, provenance
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.save import Progress, save_tensors, silent
from eutectic.ensemble._ensemble import Ensemble, Examples
from eutectic.ensemble._party import Party, open_party, put_party
from eutectic.errors import CheckpointError, ParameterError, RecipeError, TaskError, UnknownNameError, did_you_mean
from eutectic.merge.api import state_dict
from eutectic.merge.recipe import Recipe
from eutectic.merge.run import local
from eutectic.registry import reference

MODEL_TYPE = "eutectic_ensemble"


def combine(
    method: str,
    parties: Mapping[str, Party | str | Path],
    examples: tuple[Tensor, Tensor] | None = None,
    *,
    seed: int = 0,
    progress: Progress = silent,
    **parameters: Any,
) -> Ensemble:
    """Combine the predictions of networks that cannot be merged: of any architecture, over label sets that may differ.

    Args:
        method: a registered rule, such as ``density_reuse``; see ``eutectic methods``.
        parties: by name: folders that parties wrote, or parties in memory.  Calibration changes those in memory.
        examples: labelled inputs that the parties share, ``[N, *shape]``, and labels ``[N]`` as places in the sorted union of
            all classes; for rules that are fitted.
        seed: fixes the result.
        progress: is told (what, done, total).
        parameters: of the method.

    Returns a network: inputs ``[B, *shape]`` → log p(y | x) ``[B, C]`` over ``.classes``.
    Raises UnknownNameError, ParameterError, TaskError, CheckpointError, LayoutError, NonFiniteError.
    """
    opened = {name: party if isinstance(party, Party) else open_party(party) for name, party in parties.items()}
    ensemble = Ensemble(method, opened, parameters)
    ensemble.fit(None if examples is None else Examples(*examples), seed, progress)
    return ensemble


def fuse_recipe(recipe: Recipe, folder: Path, progress: Progress = silent) -> Ensemble:
    """Combine the parties that a recipe names as its ``experts``, paths relative to ``folder``.  Raises RecipeError as well."""
    if not recipe.experts:
        raise RecipeError(f"{recipe.method} combines parties: name their folders as `experts`")
    parties = {name: open_party(local(path, folder)) for name, path in recipe.experts.items()}
    ensemble = Ensemble(recipe.method, parties, recipe.parameters)
    examples = None if recipe.examples is None else read_examples(local(recipe.examples, folder), "train", ensemble.classes)
    ensemble.fit(examples, recipe.seed, progress)
    return ensemble


def read_examples(path: Path, split: str, classes: tuple[str, ...]) -> Examples:
    """``SPLIT_images``, ``SPLIT_labels`` and ``classes`` of an ``.npz``, its labels as places in ``classes``.

    Images are uint8 ``[N, H, W, C]`` and become ``[N, C, H, W]`` in 0 … 1; floating inputs are taken as they are.
    Raises TaskError naming the file, and the class that no party knows; pickles are refused.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            images, labels, names = (np.asarray(data[key]) for key in (f"{split}_images", f"{split}_labels", "classes"))
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise TaskError(
            f"{path}: no labelled examples ({split}_images, {split}_labels, classes) can be read: {error}"
        ) from None
    own = [str(name) for name in names]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise TaskError(f"{path}: {len(images)} inputs need as many integers as labels, not {labels.dtype} {labels.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(own):
        raise TaskError(f"{path}: labels lie in {labels.min()} … {labels.max()}, but there are {len(own)} classes")
    place = {name: at for at, name in enumerate(classes)}
    unknown = sorted({own[label] for label in np.unique(labels)} - place.keys())
    if unknown:
        raise TaskError(f"{path}: no party knows the class {unknown[0]!r}.{did_you_mean(unknown[0], classes)}")
    inputs = torch.from_numpy(images)
    if images.dtype == np.uint8 and images.ndim == 4:
        inputs = inputs.permute(0, 3, 1, 2) / 255
    return Examples(inputs.float(), torch.tensor([place[own[label]] for label in labels], dtype=torch.long))


def save_ensemble(ensemble: Ensemble, out: str | Path, *, replace: bool = False, recipe: Recipe | None = None) -> Path:
    """Write an ensemble's folder, whole or not at all.  Raises OutputError."""
    out = Path(out)
    inputs = [party.origin for party in ensemble.parties.values() if party.origin != "memory"]
    with published(out, replace=replace, inputs=inputs) as partial:
        (partial / "parties").mkdir()
        for place, party in enumerate(ensemble.parties.values()):
            (partial / "parties" / str(place)).mkdir()
            put_party(party, partial / "parties" / str(place))
        if ensemble.fitted:
            (partial / "combination").mkdir()
            save_tensors(Memory(ensemble.fitted), partial / "combination")
        config = {"model_type": MODEL_TYPE, "method": ensemble.method, "parameters": ensemble.settings}
        config |= {"classes": list(ensemble.classes), "parties": list(ensemble.parties)}
        (partial / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        about: dict[str, Any] = {"versions": record.versions(record.ENGINE)}
        about["inputs"] = {name: {"origin": p.origin, **p.fingerprints()} for name, p in ensemble.parties.items()}
        if recipe is not None:
            about |= {"recipe": recipe.as_data(), "recipe_sha256": recipe.sha256()}
            card = model_card(
                title=out.name,
                method=ensemble.method,
                base_model=(),
                models=list(ensemble.parties),
                recipe=recipe.to_yaml(),
                citations=[reference("ensemble", ensemble.method)],
                library_name="eutectic",
            )
            (partial / "README.md").write_text(card, encoding="utf-8")
        (partial / "eutectic.json").write_text(provenance(about), encoding="utf-8")
    return out


def is_ensemble(folder: Path) -> bool:
    """Whether a folder holds an ensemble that Eutectic saved.  Raises CheckpointError for a config that is no JSON."""
    path = folder / "config.json"
    return path.exists() and read_json(path).get("model_type") == MODEL_TYPE


def load_ensemble(folder: str | Path) -> Ensemble:
    """The network in an ensemble's folder.  Raises CheckpointError, LayoutError."""
    folder = Path(folder)
    path = folder / "config.json"
    match read_json(path):
        case {"method": str() as method, "parameters": dict() as parameters, "parties": list() as names}:
            parties = {str(name): open_party(folder / "parties" / str(place)) for place, name in enumerate(names)}
        case _:
            raise CheckpointError(f"{path}: an ensemble lacks its method, parameters or parties; save it anew")
    fitted = folder / "combination"
    try:
        return Ensemble(method, parties, parameters, state_dict(open_folder(fitted)) if fitted.exists() else None)
    except (UnknownNameError, ParameterError, TaskError) as error:
        raise CheckpointError(f"{path}: {error}") from None
