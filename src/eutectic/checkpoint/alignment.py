"""Models with different vocabularies, brought to one: the plan of whose rows go where (``aligned`` follows it).

A token that a model has keeps its row.  One that it lacks gets, for every model alike, the row that a rule names, else the
base's, else that of the only model that has it, else the mean of those that do, and zeros if none does.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eutectic.checkpoint.tokenizer import FLAGS, MAX_IDS, Vocabulary, copy_tokenizer_files, update_configs
from eutectic.errors import RecipeError, did_you_mean

#: what a row of ``RowMap.model`` may be besides the position of a model
ZERO, MEAN, BLEND = -1, -2, -3
#: rows of models, as (position of the model, row): none is zeros, several are their mean
Fill = tuple[tuple[int, int], ...]


class RowMap(NamedTuple):
    """Where each row of one model's new embedding comes from."""

    model: np.ndarray  # int32 [rows]: a position in ``Alignment.models``, or ZERO, MEAN, BLEND
    row: np.ndarray  # int64 [rows]: the row there
    blends: Mapping[int, Fill]  # new row → the rows whose mean it is


@dataclass(frozen=True)
class Alignment:
    """One vocabulary for several models, and how each gets there.

    ``tokens`` is the output's vocabulary, ``rows`` the length of its embeddings (with padding), ``tokenizer`` the model
    whose tokenizer files it takes, and ``extra`` the added tokens to append there, as tokenizer.json lists them.  ``reach``
    is how many of a model's own rows are its tokens'.  ``notes`` are for the user: what is not as one might expect.
    """

    models: tuple[str, ...]
    tokens: Mapping[str, int]
    rows: int
    tokenizer: str
    extra: tuple[Mapping[str, Any], ...]
    maps: Mapping[str, RowMap]
    reach: Mapping[str, int]
    notes: tuple[str, ...]


def plan_alignment(
    base: str | None,
    models: Mapping[str, Vocabulary],
    source: str = "union",
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Alignment:
    """Plan one vocabulary for ``models``; reads no weights.

    Args:
        base: the base's name among ``models``, if there is one.
        models: name → vocabulary, in the order that decides the ids of new tokens.
        source: ``union`` keeps the base's ids (without a base, the first model's) and appends all other tokens, in model
            order, then id order; ``base`` or a model's name takes that vocabulary as it is.
        tokens: token → ``{source: …, force: …}``, where ``source`` is a model's name, ``{kind: model_token, model: …,
            token: …}`` (or ``token_id``) or ``{kind: zero}``: the row for models that lack the token, with ``force: true``
            for all; without a source, the row that they would have anyway.  A union gains tokens that only a rule names.
        pad_to_multiple_of: of the output's rows.  By default they are as many as the source's config says, or more if
            the tokens need more; 1 removes the padding.

    Raises RecipeError for a rule or source that names what is not there.
    """
    if base is not None and base not in models:
        raise RecipeError(f"tokenizer: the base {base!r} is none of the models.{did_you_mean(base, models)}")
    first = _resolve(source, base, models)
    output, extra, notes = _union(first, models, tokens or {}) if source == "union" else (dict(models[first].tokens), [], [])
    rules = _rules(tokens or {}, models, output)
    size = 1 + max(output.values())
    if pad_to_multiple_of is None:
        rows = max(size, models[first].rows or 0)
    elif isinstance(pad_to_multiple_of, int) and not isinstance(pad_to_multiple_of, bool) and pad_to_multiple_of > 0:
        rows = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    else:
        raise RecipeError(f"tokenizer: pad_to_multiple_of is {pad_to_multiple_of!r}; give a positive integer")
    if rows > MAX_IDS:
        raise RecipeError(f"tokenizer: the output would have {rows} rows; at most {MAX_IDS} are supported")
    owned = [_owned(vocabulary) for vocabulary in models.values()]
    at = None if base is None else list(models).index(base)
    ruled = {token: fill for token, (fill, _) in rules.items() if fill is not None}
    fills = {token: ruled[token] if token in ruled else _default(token, owned, at) for token in output}
    nowhere = [token for token, fill in fills.items() if not fill and token not in ruled]
    if nowhere:
        notes.append(f"no model has a row for {_some(nowhere)}: zeros; give a rule (`tokens:`) to start from another token")
    forced = {token for token, (_, force) in rules.items() if force}
    return Alignment(
        models=tuple(models),
        tokens=output,
        rows=rows,
        tokenizer=first,
        extra=tuple(extra),
        maps={name: _row_map(i, models[name], owned[i], output, rows, fills, forced) for i, name in enumerate(models)},
        reach={name: vocabulary.reach for name, vocabulary in models.items()},
        notes=tuple(notes),
    )


def write_tokenizer(alignment: Alignment, folders: Mapping[str, str | Path], target: str | Path) -> list[str]:
    """Give a merged model's folder its tokenizer files, and its configs that tokenizer's size and token ids.

    ``folders`` are the models', by name; whatever tokenizer files ``target`` has are replaced.  Returns the names of those
    written.  Raises CheckpointError and OutputError.
    """
    source = folders[alignment.tokenizer]
    written = copy_tokenizer_files(source, target, alignment.extra)
    update_configs(target, alignment.rows, source)
    return written


# ── the plan ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _resolve(source: str, base: str | None, models: Mapping[str, Vocabulary]) -> str:
    """The model whose tokenizer the output's begins with."""
    if source == "union" and models:
        return next(iter(models)) if base is None else base
    if source == "base" and base is not None:
        return base
    name = source if source in models else source.removeprefix("model:")  # as older recipes write it
    if name in models:
        return name
    if source == "base":
        raise RecipeError("tokenizer: the source is `base`, but there is no base model. Name one, or take `union` or a model")
    raise RecipeError(
        f"tokenizer: the source {source!r} is no model of this merge.{did_you_mean(name, ['union', 'base', *models])}"
    )


def _union(
    first: str, models: Mapping[str, Vocabulary], rules: Mapping[str, Any]
) -> tuple[dict[str, int], list[dict[str, Any]], list[str]]:
    """The first vocabulary with the other tokens after it: token → id, the entries for tokenizer.json, and notes."""
    tokens, size = dict(models[first].tokens), models[first].size
    extra: list[dict[str, Any]] = []
    ordinary = []
    for vocabulary in (*models.values(), None):
        found = rules if vocabulary is None else sorted(vocabulary.tokens, key=vocabulary.tokens.__getitem__)
        for token in (token for token in found if token not in tokens):
            tokens[token] = size + len(extra)
            flags = vocabulary.added.get(token, {}) if vocabulary is not None else {}
            extra.append({"id": tokens[token], "content": token, **{flag: flags.get(flag, False) for flag in FLAGS}})
            if vocabulary is not None and token not in vocabulary.added:
                ordinary.append(token)
    if extra and len(models[first].tokens) < size:
        raise RecipeError(
            f"tokenizer: {first} has ids that no token has, which new tokens would be given on loading; a union cannot be "
            f"written. Take `source: {first}`, or number its tokens without gaps"
        )
    if any(not item["content"] for item in extra):
        raise RecipeError(
            "tokenizer: one of the vocabularies has an empty token, which no union can add. Take one of the models"
        )
    words = f"ordinary tokens of other models join {first}'s as added tokens, found in text only as they are written: "
    return tokens, extra, [words + _some(ordinary)] if ordinary else []


def _rules(
    tokens: Mapping[str, Mapping[str, Any]], models: Mapping[str, Vocabulary], output: Mapping[str, int]
) -> dict[str, tuple[Fill | None, bool]]:
    """Token → the rows that its rule gives (None: those that it would have anyway), and whether to all models."""
    rules: dict[str, tuple[Fill | None, bool]] = {}
    for token, rule in tokens.items():
        where = f"tokenizer: tokens: {token!r}"
        if token not in output:
            close = difflib.get_close_matches(token, [t for v in models.values() for t in v.added], 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{where}: is not in the output's vocabulary.{hint} Only `source: union` can add it")
        _require_keys(where, rule, ("source", "force"), ())
        if not isinstance(force := rule.get("force", False), bool):
            raise RecipeError(f"{where}: force is {force!r}; give true or false")
        rules[token] = None if rule.get("source") is None else _fill(where, token, rule["source"], models), force
    return rules


def _fill(where: str, token: str, source: Any, models: Mapping[str, Vocabulary]) -> Fill:
    if isinstance(source, str):
        source = {"kind": "model_token", "model": source, "token": token}
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind == "zero":
        _require_keys(where, source, ("kind",), ())
        return ()
    if kind != "model_token":
        raise RecipeError(f"{where}: its source is {source!r}; give a model, {{kind: model_token, …}} or {{kind: zero}}")
    _require_keys(where, source, ("kind", "model", "token", "token_id"), ("model",))
    name, other, at = source["model"], source.get("token"), source.get("token_id")
    if not isinstance(name, str) or name not in models:
        raise RecipeError(f"{where}: {name!r} is no model of this merge.{did_you_mean(str(name), models)}")
    if (at is None) == (not isinstance(other, str)):
        raise RecipeError(f"{where}: a model_token has either a token, which is text, or a token_id")
    rows = models[name].rows or models[name].size
    if isinstance(other, str):
        at = models[name].tokens.get(other, rows)
        if at >= rows:
            raise RecipeError(f"{where}: {name} has no row for {other!r}. Name a model or token that has one")
    elif not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < rows:
        raise RecipeError(f"{where}: token_id is {at!r}, but the rows of {name} are 0 to {rows - 1}")
    return ((list(models).index(name), at),)


def _require_keys(where: str, found: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    if not isinstance(found, Mapping):
        raise RecipeError(f"{where}: is {found!r}; give a mapping of {', '.join(known)}")
    for key in found:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), known)}")
    for key in needed:
        if key not in found:
            raise RecipeError(f"{where}: lacks `{key}:`")


def _owned(vocabulary: Vocabulary) -> Mapping[str, int]:
    """The tokens that have a row."""
    if vocabulary.reach == vocabulary.size:
        return vocabulary.tokens
    return {token: at for token, at in vocabulary.tokens.items() if at < vocabulary.reach}


def _default(token: str, owned: list[Mapping[str, int]], base: int | None) -> Fill:
    if base is not None and token in owned[base]:
        return ((base, owned[base][token]),)
    return tuple((i, tokens[token]) for i, tokens in enumerate(owned) if token in tokens)


def _row_map(
    own: int,
    vocabulary: Vocabulary,
    tokens: Mapping[str, int],
    output: Mapping[str, int],
    rows: int,
    fills: Mapping[str, Fill],
    forced: set[str],
) -> RowMap:
    model, row = np.full(rows, MEAN, np.int32), np.zeros(rows, np.int64)
    # rows of no token that the model has itself stay as they are
    padding = np.ones(min(rows, vocabulary.rows or vocabulary.size), bool)
    used = np.fromiter(tokens.values(), np.int64)
    padding[used[used < len(padding)]] = False
    model[: len(padding)][padding] = own
    row[: len(padding)][padding] = np.flatnonzero(padding)
    blends: dict[int, Fill] = {}
    for token, new in output.items():
        fill = ((own, tokens[token]),) if token in tokens and token not in forced else fills[token]
        if len(fill) > 1:
            model[new], blends[new] = BLEND, fill
        else:
            model[new], row[new] = fill[0] if fill else (ZERO, 0)
    return RowMap(model, row, blends)


def _some(tokens: list[str]) -> str:
    return ", ".join(map(repr, tokens[:5])) + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")
