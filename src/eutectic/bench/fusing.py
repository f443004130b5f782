"""Recipes of methods that are fitted: what they name is opened, fitted, and applied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from eutectic.bench.backbones import backbone
from eutectic.bench.evaluate import suite_models
from eutectic.bench.suite import Suite
from eutectic.bench.zoo import open_suite
from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import ParameterError, RecipeError, did_you_mean
from eutectic.fusion._api import fit, fused, load_artefact, with_parameters
from eutectic.fusion._fusion import Artefact, ModelSet, Run
from eutectic.merge.compose import Composed
from eutectic.merge.recipe import Recipe
from eutectic.merge.run import opened


def fit_recipe(recipe: Recipe, folder: Path, run: Run) -> Artefact:
    """Fit what a recipe says, paths relative to ``folder``.

    Raises RecipeError if it names an artefact, or neither a suite nor tasks, and what fitting raises.
    """
    if not recipe.is_fitted:
        raise RecipeError(f"{recipe.method} is fitted to nothing: `eutectic merge` runs the recipe")
    if recipe.artefact is not None:
        raise RecipeError("the recipe has an `artefact`, so it is fitted already: `eutectic merge` applies it")
    named = recipe.suite or recipe.tasks
    if named is None:
        raise RecipeError(f"{recipe.method} is fitted to data: name a `suite`, or a `base`, `experts` and `tasks`")
    base, experts = _models(recipe, folder)
    suite = _suite(named, folder)
    tasks = [suite.task(name) for name in suite.classes if name in experts]
    for name in experts:
        if name not in suite.classes:
            raise RecipeError(f"the expert {name!r} has no task of its name in {named}.{did_you_mean(name, suite.classes)}")
    network = _network(recipe, suite, base, folder).to(run.device)
    return fit(recipe.method, ModelSet(network, base, experts), tasks, recipe.parameters, run)


def applied(recipe: Recipe, folder: Path, artefact: Artefact | None = None) -> tuple[Recipe, Composed]:
    """The weights that a recipe's artefact makes of its models, and the recipe with what the artefact says of its fit.

    Raises RecipeError if there is none, or if the recipe says otherwise, CheckpointError.
    """
    if artefact is None:
        if recipe.artefact is None:
            raise RecipeError(
                f"{recipe.method} is fitted to data: `eutectic fuse` does so; to merge, name the `artefact` of a fit"
            )
        artefact = load_artefact(folder / recipe.artefact)
        if artefact.about["method"] != recipe.method:
            raise RecipeError(f"{recipe.artefact}: was fitted by {artefact.about['method']}, not by {recipe.method}")
    origin = recipe.artefact or "the artefact"
    try:
        artefact = with_parameters(artefact, recipe.parameters)
    except ParameterError as error:
        raise RecipeError(f"{origin}: {error}: leave it out of `parameters`, or fit anew") from None
    for key in {"seed", "protocol"} & recipe.model_fields_set:
        if getattr(recipe, key) != artefact.about[key]:
            raise RecipeError(f"{origin} was fitted with other {key}: leave out `{key}`, or fit anew")
    base, experts = _models(recipe, folder)
    facts = {key: artefact.about[key] for key in ("parameters", "seed", "protocol")}
    return recipe.model_copy(update=facts), fused(base, experts, artefact)


def _models(recipe: Recipe, folder: Path) -> tuple[Checkpoint, Mapping[str, Checkpoint]]:
    if recipe.suite is not None:
        suite, experts = suite_models(recipe)
        return suite.base, experts
    base, experts = opened(recipe, folder)
    if base is None:
        raise RecipeError(f"{recipe.method} works on task vectors: name the `base` that the experts were fine-tuned from")
    return base, experts


def _suite(name: str, folder: Path) -> Suite:
    return open_suite(str(folder / name) if (folder / name / "suite.json").exists() else name)


def _network(recipe: Recipe, suite: Suite, base: Checkpoint, folder: Path) -> nn.Module:
    if recipe.suite is not None:
        return suite.backbone()
    return backbone(base.files[-1].parent / "config.json", base, suite.info["settings"]["pooling"])
