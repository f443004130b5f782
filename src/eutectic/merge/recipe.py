"""Recipes: validated YAML with line numbers in its errors, and a canonical hash."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from eutectic import registry
from eutectic.errors import ParameterError, RecipeError, UnknownNameError, did_you_mean
from eutectic.methods._method import validated

Dtype = Literal["float64", "float32", "float16", "bfloat16"]


class OverrideModel(pydantic.BaseModel):
    """Parameters for the tensors whose names match a glob pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: str
    parameters: dict[str, Any]


class Recipe(pydantic.BaseModel):
    """What to merge, how, and into what; frozen.

    Experts are named: a list gets the names ``"0"``, ``"1"`` …  ``dtype`` accepts inputs of any floating dtype and is the
    output's.  A ``suite`` of the zoo gives base, experts and tasks; ``experts`` is then an optional choice among them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    base: str | None = None
    experts: dict[str, str] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)
    overrides: tuple[OverrideModel, ...] = ()
    dtype: Dtype | None = None
    suite: str | None = None
    protocol: Literal["inductive", "transductive"] = "inductive"
    seed: Annotated[int, Field(ge=0)] = 0

    @pydantic.field_validator("experts", mode="before")
    @classmethod
    def _named(cls, experts: Any) -> Any:
        return {str(i): expert for i, expert in enumerate(experts)} if isinstance(experts, (list, tuple)) else experts

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, defaults spelled out: equal recipes give equal text (experts keep their order)."""
        data = self.model_dump(mode="json")
        data["experts"] = list(data["experts"].items())
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def sha256(self) -> str:
        """Hash of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is default."""
        stream = io.StringIO()
        YAML(typ="safe", pure=True).dump(self.model_dump(mode="json", exclude_defaults=True), stream)
        return stream.getvalue()


def parse(text: str, source: str = "recipe") -> Recipe:
    """Read a recipe.  Raises RecipeError with ``source:line`` and the nearest word for one that is misspelt."""
    try:
        data = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{source}:{line}: not YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None
    if not isinstance(data, CommentedMap):
        raise RecipeError(f"{source}:1: a recipe is a mapping with a `method:`")
    for key in data:
        if key not in Recipe.model_fields:
            raise RecipeError(
                f"{source}:{_line(data, [key])}: unknown key {key!r}.{did_you_mean(str(key), Recipe.model_fields)}"
            )
    try:
        recipe = Recipe(**_plain(data))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = [part for part in first["loc"] if part != "__root__"]
        name = ".".join(map(str, where))
        raise RecipeError(f"{source}:{_line(data, where)}: {name}: {first['msg']}") from None
    _check_method(recipe, data, source)
    return recipe


def load(path: Path) -> Recipe:
    """Read a recipe file.  Raises RecipeError with the path and line."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None


def _check_method(recipe: Recipe, data: CommentedMap, source: str) -> None:
    """The method's own checks, here so that their errors carry a line."""
    known = registry.names("methods")
    if recipe.method not in known:
        line = _line(data, ["method"])
        raise UnknownNameError(f"{source}:{line}: no method is called {recipe.method!r}.{did_you_mean(recipe.method, known)}")
    for where, parameters in [(["parameters"], recipe.parameters)] + [
        (["overrides", i, "parameters"], override.parameters) for i, override in enumerate(recipe.overrides)
    ]:
        try:
            validated(recipe.method, parameters)
        except ParameterError as error:
            bad = next((key for key in parameters if repr(key) in str(error)), None)
            line = _line(data, [*where, bad] if bad is not None else where)
            raise ParameterError(f"{source}:{line}: {error}") from None


def _plain(node: Any) -> Any:
    """Ruamel's annotated containers and scalars as plain Python ones."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _line(node: Any, path: list[Any]) -> int:
    """The 1-based line of the deepest part of ``path`` that the document has."""
    line = 1
    for part in path:
        if not isinstance(node, (CommentedMap, CommentedSeq)):
            break
        try:
            line = (node.lc.key(part) if isinstance(node, CommentedMap) else node.lc.item(part))[0] + 1
            node = node[part]
        except (KeyError, IndexError, TypeError):
            break
    return line
