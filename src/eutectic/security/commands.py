"""What the command line does: recipes and suites to audits, and audits to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from eutectic.bench.evaluate import suite_models
from eutectic.bench.zoo import open_suite
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.writer import explained
from eutectic.errors import RecipeError
from eutectic.fusion._fusion import ModelSet
from eutectic.merge.recipe import Recipe, load
from eutectic.merge.run import Progress, bind, opened, silent
from eutectic.security import report
from eutectic.security.audit import Audit, Probing, audit_models

#: the merge of a suite that is audited without a recipe
METHOD, PARAMETERS = "task_arithmetic", {"scale": 0.2}


def audit(
    recipe: Path | None,
    suite: str | None,
    tasks: str | None,
    only: Sequence[str] = (),
    *,
    probing: Probing,
    progress: Progress = silent,
) -> Audit:
    """The audit of a recipe's merge, or of a suite's.  ``only`` names the tasks that triggers are mined for; all by default.

    Raises RecipeError for both or neither, and for a recipe that cannot be audited: in mergekit's schema, fitted, or without a
    base; else as ``audit_models`` does.
    """
    if (recipe is None) == (suite is None):
        raise RecipeError("audit: give a recipe, or --suite, and not both")
    parsed = _recipe(recipe, suite)
    named, folder = parsed.suite or tasks or parsed.tasks, recipe.parent if recipe else Path()
    data = open_suite(named) if named else None
    if parsed.suite is not None:
        opened_suite, experts = suite_models(parsed)
        base: Checkpoint | None = opened_suite.base
    else:
        base, experts = opened(parsed, folder)
    if base is None:
        raise RecipeError(f"{recipe}: an audit looks at task vectors: name the `base` that the experts were fine-tuned from")
    if only and data is None:
        raise RecipeError("audit: --task names a task of a suite; name that with --tasks")
    chosen = [data.task(name) for name in only or data.classes if only or name in experts] if data else []
    network = data.backbone(base) if data else nn.Module()  # without tasks it is not run
    return audit_models(
        ModelSet(network, base, experts),
        chosen,
        lambda some: bind(parsed, base, some),
        f"{parsed.method} {parsed.parameters or ''}".strip(),
        probing,
        progress,
    )


def _recipe(path: Path | None, suite: str | None) -> Recipe:
    if path is None:
        return Recipe(method=METHOD, parameters=PARAMETERS, suite=suite)
    parsed = load(path)
    if not isinstance(parsed, Recipe):
        raise RecipeError(f"{path}: is in mergekit's schema; write the merge in Eutectic's to audit it")
    if parsed.is_fitted:
        raise RecipeError(f"{path}: {parsed.method} is fitted; audit the closed form beneath it, such as task_arithmetic")
    return parsed


def write(found: Audit, out: Path) -> None:
    """``audit.json`` and ``audit.html`` in a folder, which is made if need be.  Raises OutputError."""
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_json(found), indent=1, ensure_ascii=False)
        (out / "audit.json").write_text(text + "\n", encoding="utf-8")
        (out / "audit.html").write_text(report.html(found, f"Audit of {found.merge}"), encoding="utf-8")
