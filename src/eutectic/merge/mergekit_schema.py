"""One document of mergekit's schema, read from YAML into frozen data: keys and kinds are checked, no model is looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eutectic.errors import UnknownNameError, did_you_mean
from eutectic.merge.mergekit_methods import FLAGS, Rule, rule_of
from eutectic.merge.mergekit_values import Path, Reader, Settings
from eutectic.merge.vocabularies import TokenizerSpec

DTYPES = ("float64", "float32", "float16", "bfloat16")
TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
_TOP = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name"),
)


@dataclass(frozen=True)
class Reference:
    """A model as the recipe names it: ``text`` is ``path[@revision][+lora[@revision]]``, taken apart when it is opened."""

    text: str
    path: Path
    parts: tuple[str, str | None, str | None, str | None] | None = None  # path, revision, lora, its revision


@dataclass(frozen=True)
class Source:
    """One model of a slice; without a range all of its layers."""

    model: Reference
    layers: tuple[int, int] | None
    settings: Settings
    path: Path


@dataclass(frozen=True)
class Slice:
    """Layers of the output, and what they are merged from."""

    sources: tuple[Source, ...]
    base: Reference | None
    settings: Settings
    path: Path


@dataclass(frozen=True)
class Module:
    """One tower of the output; the name is None if there is but one."""

    name: str | None
    slices: tuple[Slice, ...]
    settings: Settings
    path: Path


@dataclass(frozen=True)
class Document:
    """One merge of a recipe."""

    reader: Reader
    name: str | None
    method: str
    rule: Rule
    base: Reference | None
    modules: tuple[Module, ...]
    settings: Settings
    dtype: str | None
    tokenizer: TokenizerSpec | None
    chat_template: str | None

    def references(self) -> list[Reference]:
        """All models that it names, the base first."""
        slices = [part for module in self.modules for part in module.slices]
        bases = [self.base, *(part.base for part in slices)]
        return [ref for ref in bases if ref is not None] + [source.model for part in slices for source in part.sources]


def read_document(reader: Reader) -> Document:
    """Read and check one document.  Raises RecipeError, UnknownNameError with the line."""
    top = reader.mapping(reader.document, (), _TOP, required=["merge_method"])
    method = reader.text(top["merge_method"], ("merge_method",))
    try:
        rule = rule_of(method)
    except UnknownNameError as error:
        raise UnknownNameError(f"{reader.where(['merge_method'])}: {error}") from None
    bodies = [key for key in ("models", "slices", "modules") if key in top]
    if reader.compat:
        bodies = [key for key in bodies if top[key]] or bodies
    if len(bodies) != 1:
        raise reader.error(
            bodies[1:2], f"give one of `models`, `slices` and `modules`, not {' and '.join(bodies) if bodies else 'none'}"
        )
    base = read_reference(reader, top["base_model"], ("base_model",)) if "base_model" in top else None
    if base is None and rule.base == "vectors":
        raise reader.error(["merge_method"], f"{method} works on task vectors: it needs a `base_model`")
    if "tokenizer" in top and "tokenizer_source" in top:
        raise reader.error(["tokenizer"], "give `tokenizer` or `tokenizer_source`, not both")
    if bodies == ["modules"]:
        modules = tuple(
            _module(reader, rule, str(name), node, ("modules", str(name)))
            for name, node in _named(reader, top["modules"], ("modules",)).items()
        )
    else:
        modules = (_module(reader, rule, None, {bodies[0]: top[bodies[0]]}, ()),)
    document = Document(
        reader,
        reader.text(top["name"], ("name",)) if "name" in top else None,
        method,
        rule,
        base,
        modules,
        _settings(reader, rule, top, ()),
        read_dtype(reader, top),
        None,
        _template(reader, top["chat_template"]) if "chat_template" in top else None,
    )
    spec = _tokenizer(reader, top, document)
    return dataclasses.replace(document, tokenizer=spec)


def _named(reader: Reader, node: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(node, Mapping) or not node:
        raise reader.error(path, "`modules` must map the name of a module to its `models` or `slices`")
    return node


def _module(reader: Reader, rule: Rule, name: str | None, node: Any, path: Path) -> Module:
    body = reader.mapping(node, path, ("models", "slices", "parameters"))
    if ("models" in body) == ("slices" in body):
        raise reader.error(path, f"the module {name!r} needs `models` or `slices`, and not both")
    if "models" in body:
        where = (*path, "models")
        sources = [
            _source(reader, rule, item, (*where, i), ("model", "parameters"))
            for i, item in enumerate(reader.items(body["models"], where))
        ]
        slices = (Slice(tuple(sources), None, {}, where),)
    else:
        where = (*path, "slices")
        slices = tuple(_slice(reader, rule, item, (*where, i)) for i, item in enumerate(reader.items(body["slices"], where)))
    return Module(name, slices, {} if name is None else _settings(reader, rule, body, path), path)


def _slice(reader: Reader, rule: Rule, node: Any, path: Path) -> Slice:
    body = reader.mapping(node, path, ("sources", "base_model", "parameters", "residual_weight"), required=["sources"])
    if "residual_weight" in body:
        reader.note((*path, "residual_weight"), "`residual_weight` is ignored, as mergekit does")
    where = (*path, "sources")
    sources = [
        _source(reader, rule, item, (*where, i), ("model", "layer_range", "parameters"))
        for i, item in enumerate(reader.items(body["sources"], where))
    ]
    lengths = {source.layers and source.layers[1] - source.layers[0] for source in sources}
    if len(lengths) > 1:
        ranges = ", ".join(str(list(source.layers)) if source.layers else "all" for source in sources)
        raise reader.error(where, f"the sources of one slice must have as many layers each, not {ranges}")
    base = read_reference(reader, body["base_model"], (*path, "base_model")) if "base_model" in body else None
    return Slice(tuple(sources), base, _settings(reader, rule, body, path), path)


def _source(reader: Reader, rule: Rule, node: Any, path: Path, known: tuple[str, ...]) -> Source:
    body = reader.mapping(node, path, known, required=["model"])
    layers = None
    if "layer_range" in body:
        ends, where = body["layer_range"], (*path, "layer_range")
        if not isinstance(ends, list) or len(ends) != 2:
            raise reader.error(where, "`layer_range` is [first, end], the end exclusive")
        first, last = (reader.integer(end, (*where, i), 0) for i, end in enumerate(ends))
        if first >= last:
            raise reader.error(where, f"`layer_range` [{first}, {last}] holds no layer: its end is exclusive")
        layers = (first, last)
    return Source(read_reference(reader, body["model"], (*path, "model")), layers, _settings(reader, rule, body, path), path)


def read_reference(reader: Reader, node: Any, path: Path) -> Reference:
    """A model, as a string or a mapping.  Raises RecipeError with the line."""
    if isinstance(node, str):
        return Reference(reader.text(node, path), path)
    body = reader.mapping(node, path, ("model", "lora", "override_architecture"), required=["model"])
    if "override_architecture" in body:
        reader.note((*path, "override_architecture"), "`override_architecture` is ignored: tensors go by their names")
    parts = []
    for key in ("model", "lora"):
        inner, where = body.get(key), (*path, key)
        if isinstance(inner, Mapping):
            place = reader.mapping(inner, where, ("path", "revision"), required=["path"])
            revision = reader.text(place["revision"], (*where, "revision")) if "revision" in place else None
            parts += [reader.text(place["path"], (*where, "path")), revision]
        else:
            parts += [reader.text(inner, where) if inner is not None else None, None]
    model, revision, lora, lora_revision = parts
    text = f"{model}{'@' + revision if revision else ''}"
    if lora:
        text += f"+{lora}{'@' + lora_revision if lora_revision else ''}"
    return Reference(text, path, (str(model), revision, lora, lora_revision))


def _settings(reader: Reader, rule: Rule, body: Mapping[str, Any], path: Path) -> Settings:
    """A ``parameters`` block, its keys and the kinds of its values checked."""
    where = (*path, "parameters")
    settings = reader.settings(body.get("parameters"), where)
    per_model = path and path[-2:-1] in (("models",), ("sources",))
    found = {}
    for key, choices in settings.items():
        if key in rule.ignored:
            reader.note((*where, key), f"`{key}` is ignored: {rule.ignored[key]}")
        elif key not in rule.parameters():
            method = reader.document["merge_method"]
            reader.refuse((*where, key), f"`{key}` means nothing to {method}.{did_you_mean(key, rule.parameters())}")
        elif per_model and key not in rule.each:
            reader.refuse((*where, key), f"`{key}` is not a parameter of one model; move it to the slice's or the recipe's")
        else:
            for choice in choices:
                wrong = next((value for value in choice.values if isinstance(value, bool) != (key in FLAGS)), None)
                if wrong is not None:
                    kind = "true or false" if key in FLAGS else "a number"
                    raise reader.error(choice.path, f"`{key}` must be {kind}, not {wrong!r}")
            found[key] = choices
    return found


def read_dtype(reader: Reader, top: Mapping[str, Any]) -> str | None:
    """The output's dtype, None if nothing is said.  Raises RecipeError with the line."""
    found = None
    for key in ("dtype", "out_dtype"):  # all arithmetic is in float32, so that the first says only what is saved
        if key in top:
            found = reader.text(top[key], (key,)).removeprefix("torch.")
            if found not in DTYPES:
                raise reader.error([key], f"`{key}` is {found!r}.{did_you_mean(found, DTYPES)}")
    return found


# ── the tokenizer ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _template(reader: Reader, node: Any) -> str:
    text = reader.text(node, ("chat_template",))
    if text not in TEMPLATES and not (len(text) >= 20 and "{" in text):
        raise reader.error(
            ["chat_template"],
            f"{text!r} is neither a template (20 characters or more, with a brace) nor the name of one."
            f"{did_you_mean(text, TEMPLATES)}",
        )
    return text


def _tokenizer(reader: Reader, top: Mapping[str, Any], document: Document) -> TokenizerSpec | None:
    models = [reference.text for reference in document.references()]
    if "tokenizer_source" in top:
        return TokenizerSpec(_tokenizer_source(reader, top["tokenizer_source"], ("tokenizer_source",), document))
    if "tokenizer" not in top:
        return None
    path: Path = ("tokenizer",)
    body = reader.mapping(top["tokenizer"], path, ("source", "tokens", "pad_to_multiple_of"))
    source = _tokenizer_source(reader, body.get("source", "union"), (*path, "source"), document)
    pad = body.get("pad_to_multiple_of")
    tokens = body.get("tokens", {})
    if not isinstance(tokens, Mapping):
        raise reader.error((*path, "tokens"), "`tokens` must map a token to where its embedding comes from")
    return TokenizerSpec(
        source,
        {str(token): _token(reader, node, (*path, "tokens", token), models) for token, node in tokens.items()},
        None if pad is None else reader.integer(pad, (*path, "pad_to_multiple_of"), 1),
    )


def _tokenizer_source(reader: Reader, node: Any, path: Path, document: Document) -> str:
    source = read_reference(reader, node, path).text
    if source == "base" and document.base is None:
        raise reader.error(path, "the tokenizer of the `base` is asked for, and there is no `base_model`")
    return source


def _token(reader: Reader, node: Any, path: Path, models: list[str]) -> dict[str, Any]:
    body = reader.mapping(node, path, ("source", "force"))
    rule: dict[str, Any] = {"force": True} if "force" in body and reader.flag(body["force"], (*path, "force")) else {}
    source, where = body.get("source"), (*path, "source")
    if source is None:
        return rule
    if not (isinstance(source, Mapping) and "kind" in source):
        return {"source": _known_model(reader, source, where, models), **rule}
    kind = reader.text(source["kind"], (*where, "kind"))
    if kind == "zero":
        reader.mapping(source, where, ("kind",))
        return {"source": {"kind": "zero"}, **rule}
    if kind != "model_token":
        raise reader.error((*where, "kind"), f"`kind` is {kind!r}.{did_you_mean(kind, ('model_token', 'zero'))}")
    inner = reader.mapping(source, where, ("kind", "model", "token", "token_id"), required=["model"])
    if ("token" in inner) == ("token_id" in inner):
        raise reader.error(where, "a `model_token` needs `token` or `token_id`, and not both")
    found: dict[str, Any] = {"kind": kind, "model": _known_model(reader, inner["model"], (*where, "model"), models)}
    if "token" in inner:
        found["token"] = reader.text(inner["token"], (*where, "token"))
    else:
        found["token_id"] = reader.integer(inner["token_id"], (*where, "token_id"), 0)
    return {"source": found, **rule}


def _known_model(reader: Reader, node: Any, path: Path, models: list[str]) -> str:
    text = read_reference(reader, node, path).text
    if text not in models:
        raise reader.error(path, f"{text!r} is none of the models that are merged.{did_you_mean(text, models)}")
    return text
