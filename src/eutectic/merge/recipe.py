"""Recipes: validated YAML with line numbers in its errors, and a canonical hash."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pydantic
from pydantic import ConfigDict, Field
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from eutectic import registry
from eutectic.errors import ParameterError, RecipeError, UnknownNameError, did_you_mean
from eutectic.merge.defend import defended
from eutectic.merge.spaces import SpaceName
from eutectic.methods._method import signature_model, validated

if TYPE_CHECKING:
    from eutectic.merge.mergekit import MergekitRecipe

Dtype = Literal["float64", "float32", "float16", "bfloat16"]


class OverrideModel(pydantic.BaseModel):
    """Parameters for the tensors whose names match a glob pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: str
    parameters: dict[str, Any]


class TokenizerModel(pydantic.BaseModel):
    """The output's tokenizer, see ``checkpoint.alignment.plan_alignment``; models are ``base`` and the experts by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = "union"
    tokens: dict[str, dict[str, Any]] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Field(gt=0)] | None = None


class Recipe(pydantic.BaseModel):
    """What to merge, how, and into what; frozen.

    Experts are named: a list gets the names ``"0"``, ``"1"`` …  ``dtype`` accepts inputs of any floating dtype and is the
    output's.  A ``suite`` of the zoo gives base, experts and tasks; ``experts`` is then an optional choice among them.
    ``tokenizer`` gives models of several vocabularies one; ``chat_template`` is ``auto``, a built-in's name or a template.
    A method that is fitted to data has ``tasks``, a suite's name or folder, unless it has a ``suite``; or the ``artefact`` of
    an earlier fit, a folder.
    For rules that combine predictions the experts are folders of parties; ``examples``, an ``.npz``, has labelled examples that
    they share.
    With ``output: adapter`` the experts are PEFT folders, and so is the result: merged in a ``space``, core by default, and of
    ``rank`` at most.
    A file may have ``defend``, see ``merge.defend``: it is read as the recipe of the defence, with the merge in its parameters.
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
    tokenizer: TokenizerModel | None = None
    chat_template: str | None = None
    tasks: str | None = None
    artefact: str | None = None
    examples: str | None = None
    output: Literal["adapter"] | None = None
    space: SpaceName | None = None
    rank: Annotated[int, Field(ge=1)] | None = None

    @pydantic.field_validator("experts", mode="before")
    @classmethod
    def _named(cls, experts: Any) -> Any:
        return {str(i): expert for i, expert in enumerate(experts)} if isinstance(experts, (list, tuple)) else experts

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Recipe:
        if (self.tokenizer or self.chat_template) and self.suite is not None:
            raise ValueError("a suite has no tokenizer: leave out `tokenizer` and `chat_template`")
        if (self.tokenizer or self.chat_template) and self.base is not None and "base" in self.experts:
            raise ValueError(
                "with a `tokenizer` or `chat_template`, `base` means the base; give the expert of that name another one"
            )
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether the method is fitted to data, or has been."""
        return registry.room_of(self.method) == "fusion"

    @property
    def is_ensemble(self) -> bool:
        """Whether the method combines predictions, and not weights."""
        return registry.room_of(self.method) == "ensemble"

    @property
    def methods(self) -> tuple[str, ...]:
        """The method, as ``AnyRecipe`` has it."""
        return (self.method,)

    @property
    def base_models(self) -> tuple[str, ...]:
        """The base, if it names one."""
        return (self.base,) if self.base else ()

    def as_data(self) -> dict[str, Any]:
        """The recipe as JSON-ready data."""
        return self.model_dump(mode="json")

    def bound_parameters(self) -> dict[str, Any]:
        """The method's parameters as given; the recipe's seed goes to a method that takes one and is given none."""
        takes_seed = "seed" in signature_model(self.method).model_fields
        return ({"seed": self.seed} if takes_seed else {}) | self.parameters

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, defaults spelled out: equal recipes give equal text (experts keep their order)."""
        data = self.model_dump(mode="json")
        data["parameters"] = validated(self.method, self.bound_parameters())
        data["seed"] = data["parameters"].get("seed", self.seed)
        for override in data["overrides"]:
            given = validated(self.method, override["parameters"])
            override["parameters"] = {key: given[key] for key in override["parameters"]}
        data["experts"] = list(data["experts"].items())
        # left out where they say nothing, so that older recipes keep their hashes
        late = ("tokenizer", "chat_template", "tasks", "artefact", "examples", "output", "space", "rank")
        data = {key: value for key, value in data.items() if value is not None or key not in late}
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def sha256(self) -> str:
        """Hash of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is default."""
        stream = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.sort_base_mapping_type_on_output = False  # the order of the experts is part of the recipe
        yaml.dump(self.model_dump(mode="json", exclude_defaults=True), stream)
        return stream.getvalue()


class AnyRecipe(Protocol):
    """What a saved folder needs to know of a recipe, in whichever schema it is."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it names."""
        ...

    @property
    def base_models(self) -> tuple[str, ...]:
        """The base, if there is one, as the recipe names it."""
        ...

    def canonical_json(self) -> str:
        """Equal recipes give equal text."""
        ...

    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        ...

    def to_yaml(self) -> str:
        """For the model card."""
        ...

    def as_data(self) -> dict[str, Any]:
        """For the provenance."""
        ...


def parse(text: str, source: str = "recipe") -> Recipe:
    """Read a recipe.  Raises RecipeError with ``source:line`` and the nearest word for one that is misspelt."""
    with _yaml_errors(source):
        data = YAML(typ="rt", pure=True).load(text)
    if not isinstance(data, CommentedMap):
        raise RecipeError(f"{source}:1: a recipe is a mapping with a `method:`")
    _require_distinct_keys(data, source)
    known = (*Recipe.model_fields, "defend")
    for key in data:
        if key not in known:
            raise RecipeError(f"{source}:{line_of(data, [key])}: unknown key {key!r}.{did_you_mean(str(key), known)}")
    try:
        recipe = Recipe(**_under_its_defence(data, source))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = [part for part in first["loc"] if part != "__root__"]
        name = ".".join(map(str, where)) or "the recipe"
        said = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{source}:{line_of(data, where)}: {name}: {said}") from None
    _check_method(recipe, data, source)
    return recipe


def _under_its_defence(data: CommentedMap, source: str) -> dict[str, Any]:
    """A recipe's data, with ``defend`` as the method that it stands for.  Errors as ``merge.defend.defended``, with a line."""
    given = plain(data)
    if "defend" not in given:
        return given
    defend, method, parameters = given.pop("defend"), given.get("method"), given.get("parameters", {})
    if not isinstance(method, str) or not isinstance(parameters, dict):
        return given  # which is refused for that
    _require_method(method, data, source)
    try:
        name, under = defended(method, parameters, defend)
    except ParameterError as error:
        where = [*error.where] if error.where[:1] in (("defend",), ("method",)) else ["parameters", *error.where]
        raise ParameterError(f"{source}:{line_of(data, where)}: {error}", tuple(where)) from None
    except UnknownNameError as error:
        raise UnknownNameError(f"{source}:{line_of(data, ['defend', 'method'])}: {error}") from None
    return given | {"method": name, "parameters": under}


def _require_method(name: str, data: CommentedMap, source: str) -> None:
    try:
        registry.room_of(name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{source}:{line_of(data, ['method'])}: {error}") from None


def load(path: Path, compat: bool = False) -> Recipe | MergekitRecipe:
    """Read a recipe file in either schema: one whose top level has ``merge_method`` is mergekit's.

    ``compat`` reads it as mergekit would, see ``parse_mergekit``.  Raises RecipeError with the path and line.
    """
    from eutectic.merge.mergekit import is_mergekit, parse_mergekit

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if is_mergekit(documents(text, str(path))):
        return parse_mergekit(text, str(path), compat)
    if compat:
        raise RecipeError(f"{path}:1: mergekit's conventions are for recipes in mergekit's schema, with a `merge_method:`")
    return parse(text, str(path))


def documents(text: str, source: str = "recipe") -> list[Any]:
    """The documents of a YAML stream, with their lines; empty ones are left out.  Raises RecipeError."""
    with _yaml_errors(source):
        return [document for document in YAML(typ="rt", pure=True).load_all(text) if document is not None]


@contextmanager
def _yaml_errors(source: str) -> Iterator[None]:
    try:
        yield
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{source}:{line}: not YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{source}: not YAML: nested too deeply") from None


def _check_method(recipe: Recipe, data: CommentedMap, source: str) -> None:
    """The method's own checks, here so that their errors carry a line."""
    _require_method(recipe.method, data, source)
    fitted, ensemble = recipe.is_fitted, recipe.is_ensemble
    for key in ("base", "suite", "overrides", "dtype", "tokenizer", "chat_template", "output", "space", "rank"):
        if ensemble and getattr(recipe, key):
            raise RecipeError(
                f"{source}:{line_of(data, [key])}: {recipe.method} combines predictions, not weights: leave out `{key}`"
            )
    if recipe.examples is not None and not ensemble:
        raise RecipeError(
            f"{source}:{line_of(data, ['examples'])}: {recipe.method} takes no labelled examples: leave out `examples`"
        )
    keeps = "keeps what the base has"
    for key, why in (
        ("overrides", "fits each tensor by itself"),
        *((key, keeps) for key in ("dtype", "tokenizer", "chat_template")),
    ):
        if fitted and getattr(recipe, key):
            raise RecipeError(f"{source}:{line_of(data, [key])}: {recipe.method} {why}: leave out `{key}`")
    for key, other in (("tasks", "suite"), ("tasks", "artefact")):
        if getattr(recipe, key) and getattr(recipe, other):
            raise RecipeError(f"{source}:{line_of(data, [key])}: a recipe with `{other}` has its tasks: leave out `{key}`")
    for key in ("tasks", "artefact"):
        if not fitted and getattr(recipe, key):
            raise RecipeError(f"{source}:{line_of(data, [key])}: {recipe.method} is fitted to nothing: leave out `{key}`")
    _check_output(recipe, data, source, fitted)
    for where, parameters in [(["parameters"], recipe.parameters)] + [
        (["overrides", i, "parameters"], override.parameters) for i, override in enumerate(recipe.overrides)
    ]:
        try:
            validated(recipe.method, parameters)
        except ParameterError as error:
            raise ParameterError(f"{source}:{line_of(data, [*where, *error.where])}: {error}", error.where) from None


def _check_output(recipe: Recipe, data: CommentedMap, source: str, fitted: bool) -> None:
    """What goes with ``output: adapter``, and what does not."""
    if recipe.output is None:
        for key in ("space", "rank"):
            if getattr(recipe, key) is not None:
                raise RecipeError(f"{source}:{line_of(data, [key])}: `{key}` is of an adapter: add `output: adapter`")
        return
    if fitted:
        raise RecipeError(f"{source}:{line_of(data, ['output'])}: {recipe.method} is fitted to data, and fuses whole models")
    for key in ("suite", "tokenizer", "chat_template"):
        if getattr(recipe, key):
            raise RecipeError(f"{source}:{line_of(data, [key])}: an adapter is merged from PEFT folders: leave out `{key}`")


def _require_distinct_keys(node: Any, source: str) -> None:
    """Refuse 1 and "1" as keys of one mapping: two in YAML, one in a recipe."""
    if isinstance(node, CommentedMap):
        seen: set[str] = set()
        for key, value in node.items():
            if str(key) in seen:
                raise RecipeError(f"{source}:{line_of(node, [key])}: the key {str(key)!r} stands twice")
            seen.add(str(key))
            _require_distinct_keys(value, source)
    elif isinstance(node, CommentedSeq):
        for value in node:
            _require_distinct_keys(value, source)


def plain(node: Any) -> Any:
    """Ruamel's annotated containers and scalars as plain Python ones, keys as text."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def line_of(node: Any, path: list[Any]) -> int:
    """The 1-based line of the last part of ``path`` that the document has; parts that it lacks are passed over."""
    line = 1
    for part in path:
        if not isinstance(node, (CommentedMap, CommentedSeq)):
            break
        if isinstance(node, CommentedSeq) and isinstance(part, str) and part.isdigit():
            part = int(part)  # experts in a list are named by their place
        if part not in (node if isinstance(node, CommentedMap) else range(len(node))):
            continue
        try:
            line = (node.lc.key(part) if isinstance(node, CommentedMap) else node.lc.item(part))[0] + 1
            node = node[part]
        except (KeyError, IndexError, TypeError):
            break
    return line
