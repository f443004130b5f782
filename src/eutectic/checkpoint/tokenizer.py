"""Tokenizer files as data: which token has which id, and what the folder of a merged model gets.

Everything here is JSON and text that is read and edited; no tokenizer is ever built or run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eutectic.checkpoint._files import AGAIN, MAX_JSON_BYTES, inside, read_json
from eutectic.checkpoint.writer import explained
from eutectic.errors import CheckpointError, LayoutError, OutputError

#: no honest vocabulary comes near; memory for an embedding's rows is claimed by the highest id
MAX_IDS = 1 << 22
#: how an added token is found in text, as tokenizer.json spells it
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

#: whichever is there gives the ids, the first first
_SOURCES = ("tokenizer.json", "vocab.json", "vocab.txt")
#: what ``read_vocabulary`` reads
VOCABULARY_FILES = (*_SOURCES, "added_tokens.json", "tokenizer_config.json", "config.json")
_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
#: where the config of a model with several towers keeps that of its text model
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_IDS = ("_token_id", "_token_index")
_NEEDED = "Save a tokenizer.json beside it: AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers writes one."


@dataclass(frozen=True)
class Vocabulary:
    """Token → id of one model.

    ``added`` holds the flags of added tokens, ``rows`` how many rows the embedding has (None: one for each id), which may
    be more than there are tokens (padding) or fewer (tokens that the model never learnt).
    Raises CheckpointError, with ``origin``, for an id that is no integer, out of range, or given to two tokens.
    """

    tokens: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    rows: int | None = None
    origin: str = "the vocabulary"

    def __post_init__(self) -> None:
        """Check the ids."""
        if not self.tokens:
            raise CheckpointError(f"{self.origin}: holds no tokens. {AGAIN}")
        for token, at in self.tokens.items():
            if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < MAX_IDS:
                raise CheckpointError(f"{self.origin}: the id of {token!r} is {at!r}, not an integer below {MAX_IDS}. {AGAIN}")
        if len(set(self.tokens.values())) < len(self.tokens):
            at, _ = Counter(self.tokens.values()).most_common(1)[0]
            twins = " and ".join(repr(token) for token, other in self.tokens.items() if other == at)
            raise CheckpointError(f"{self.origin}: {twins} share the id {at}. {AGAIN}")
        if self.rows is not None and not 0 < self.rows <= MAX_IDS:
            raise CheckpointError(f"{self.origin}: {self.rows} embedding rows (vocab_size in config.json) cannot be. {AGAIN}")

    @cached_property
    def size(self) -> int:
        """One more than the highest id."""
        return 1 + max(self.tokens.values())

    @cached_property
    def reach(self) -> int:
        """How many of the ``size`` ids have a row in the embedding."""
        return self.size if self.rows is None else min(self.size, self.rows)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether ``read_vocabulary`` has something to read there."""
    return any((Path(folder) / name).is_file() for name in _SOURCES)


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """The vocabulary of a model's folder, from tokenizer.json, or vocab.json, or vocab.txt, and the tokens added to it.

    ``rows`` is the config's ``vocab_size``.  Raises CheckpointError, with the file, if there is none of them, or nothing
    that can be trusted.
    """
    folder = Path(folder)
    name = next((name for name in _SOURCES if (folder / name).is_file()), None)
    if name is None:
        others = sorted(path.name for path in folder.glob("*.model")) if folder.is_dir() else []
        only = f"of its tokenizer there is only {others[0]}, which is not read" if others else "holds no tokenizer"
        raise CheckpointError(f"{folder}: {only}. {_NEEDED}")
    path = inside(folder, name)
    added: dict[str, dict[str, bool]] = {}
    if name == "tokenizer.json":
        data = read_json(path)
        tokens = _model_vocabulary(data.get("model"), path)
        _add(tokens, added, _listed(data.get("added_tokens") or [], path), path)
    else:
        tokens = dict(read_json(path)) if name == "vocab.json" else _lines(path)
    if (folder / "added_tokens.json").is_file():
        path = inside(folder, "added_tokens.json")
        _add(tokens, added, [{"content": token, "id": at} for token, at in read_json(path).items()], path)
    if (folder / "tokenizer_config.json").is_file():
        path = inside(folder, "tokenizer_config.json")
        _add(tokens, added, _decoder(read_json(path).get("added_tokens_decoder") or {}, path), path)
    rows = _rows(read_json(inside(folder, "config.json"))) if (folder / "config.json").is_file() else None
    return Vocabulary(tokens, added, rows, str(folder))


def vocabulary_digest(folder: str | Path) -> str:
    """A hash of a folder's tokenizer files that is equal only if their tokens and ids are; the large ones are not parsed.

    Raises CheckpointError for a link that leaves the folder or a file that cannot be read.
    """
    folder, whole = Path(folder), hashlib.sha256()
    names = [name for name in _SOURCES if (folder / name).is_file()][:1]
    for name in (*names, *(name for name in ("added_tokens.json",) if (folder / name).is_file())):
        path = inside(folder, name)
        try:
            with path.open("rb") as file:
                whole.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if (folder / "tokenizer_config.json").is_file():  # of which much else may differ, such as the chat template
        path = inside(folder, "tokenizer_config.json")
        items = _decoder(read_json(path).get("added_tokens_decoder") or {}, path)
        whole.update(repr(sorted((repr(item["id"]), repr(item.get("content"))) for item in items)).encode())
    return whole.hexdigest()


def require_same_vocabulary(models: Mapping[str, Vocabulary]) -> None:
    """Refuse models that mean different tokens by one row.  Raises LayoutError with the first difference and what to do."""
    first = next(iter(models), "")
    for name in models:
        left, right = models[first].tokens, models[name].tokens
        if left == right:
            continue
        differing = [token for token in {**left, **right} if left.get(token) != right.get(token)]
        token = differing[0]
        says = {
            who: "lacks it" if at is None else f"has id {at}"
            for who, at in ((first, left.get(token)), (name, right.get(token)))
        }
        raise LayoutError(
            f"the vocabularies of {first} and {name} differ in {len(differing)} token(s), such as {token!r}: "
            f"{first} {says[first]}, {name} {says[name]}. Say which one the merged model has: "
            "`tokenizer: {source: union}`, `base`, or one of the models."
        )


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def copy_tokenizer_files(source: str | Path, target: str | Path, extra: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Put the tokenizer files of one folder into another in place of its own; returns the names of those written.

    ``extra`` are added tokens to append, as tokenizer.json lists them (``id``, ``content``, flags).  Raises CheckpointError
    for a link that leaves the folder or a file that is not JSON, OutputError if nothing can be written
    or both are one folder.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise OutputError(f"{target}: is where the tokenizer comes from. Choose another path.")
    for path in [path for pattern in _FILES for path in target.glob(pattern)]:
        path.unlink()
    written = []
    for path in [path for pattern in _FILES for path in sorted(source.glob(pattern))]:
        name = path.relative_to(source).as_posix()
        if not inside(source, name).is_file():
            continue
        with explained(target / name):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
        written.append(name)
    if "tokenizer_config.json" in written:  # code is never copied, so nothing may point to it
        config = read_json(target / "tokenizer_config.json")
        write_json(target / "tokenizer_config.json", config, {k: v for k, v in config.items() if k != "auto_map"})
    return sorted({*written, *_append(target, extra)}) if extra else written


def update_configs(target: str | Path, rows: int, source: str | Path) -> None:
    """Let config.json say ``vocab_size: rows``, and it and generation_config.json have the token ids of ``source``'s.

    A model's ``eos_token_id`` and its like mean nothing in another's vocabulary; ``source`` is the folder whose tokenizer
    the merged model has.  Raises CheckpointError for a config that is not JSON.
    """
    source, target = Path(source), Path(target)
    for name in ("config.json", "generation_config.json"):
        if not (target / name).is_file():
            continue
        config = read_json(target / name)
        wanted = _with_token_ids(config, read_json(inside(source, name))) if (source / name).is_file() else config
        write_json(target / name, config, _resized(wanted, rows) if name == "config.json" else wanted)


# ── reading and editing ───────────────────────────────────────────────────────────────────────────────────────────────


def _model_vocabulary(model: Any, path: Path) -> dict[str, Any]:
    """Token → id of tokenizer.json's ``model``: a mapping (BPE, WordPiece, WordLevel), or a list in id order (Unigram)."""
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, dict):
        return dict(found)
    if not isinstance(found, list):
        raise CheckpointError(f"{path}: its model has no `vocab` that is a mapping or a list. {_NEEDED}")
    return _numbered((item[0] if isinstance(item, list) and item else item for item in found), path)


def _lines(path: Path) -> dict[str, Any]:
    lines = read_text(path, MAX_JSON_BYTES).split("\n")
    return _numbered((line.removesuffix("\r") for line in lines[: -1 if lines[-1] == "" else None]), path)


def _numbered(found: Iterable[Any], path: Path) -> dict[str, Any]:
    tokens: dict[str, Any] = {}
    for at, token in enumerate(found):
        if not isinstance(token, str):
            raise CheckpointError(f"{path}: token number {at} is {token!r}, not text. {AGAIN}")
        if token in tokens:
            raise CheckpointError(f"{path}: the token {token!r} comes twice, as {tokens[token]} and {at}. {AGAIN}")
        tokens[token] = at
    return tokens


def _listed(found: Any, path: Path) -> list[Mapping[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise CheckpointError(f"{path}: its added_tokens are not a list of mappings. {AGAIN}")
    return found


def _decoder(found: Any, path: Path) -> list[Mapping[str, Any]]:
    if not isinstance(found, dict) or not all(isinstance(item, dict) for item in found.values()):
        raise CheckpointError(f"{path}: its added_tokens_decoder is not a mapping of mappings. {AGAIN}")
    ids = {key: int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key for key in found}
    return [{**item, "id": ids[key]} for key, item in found.items()]


def _add(tokens: dict[str, Any], added: dict[str, dict[str, bool]], found: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Join added tokens, of which every file must say the same."""
    for item in found:
        token, at = item.get("content"), item.get("id")
        if not isinstance(token, str):
            raise CheckpointError(f"{path}: the content of the added token {at!r} is not text but {token!r}. {AGAIN}")
        if tokens.setdefault(token, at) != at:
            raise CheckpointError(
                f"{path}: gives {token!r} the id {at}, but elsewhere in {path.parent} it is {tokens[token]}. "
                "Remove the file that is stale, or save the tokenizer again."
            )
        added[token] = {**added.get(token, {}), **{flag: item[flag] is True for flag in FLAGS if flag in item}}


def _append(target: Path, extra: Sequence[Mapping[str, Any]]) -> set[str]:
    """Append added tokens to every file of ``target`` that lists them."""
    edits: dict[str, Any] = {}
    entries = [{"id": item["id"], "content": item["content"], **{f: bool(item.get(f)) for f in FLAGS}} for item in extra]
    if (path := target / "tokenizer.json").is_file():
        data = read_json(path)
        edits[path.name] = data, {**data, "added_tokens": [*_listed(data.get("added_tokens") or [], path), *entries]}
    if (path := target / "added_tokens.json").is_file() or not edits:  # older formats have no other place for them
        data = read_json(path) if path.is_file() else {}
        edits[path.name] = data, {**data, **{item["content"]: item["id"] for item in entries}}
    if (path := target / "tokenizer_config.json").is_file():
        data = read_json(path)
        before = data.get("added_tokens_decoder") or {}
        _decoder(before, path)
        if before or "tokenizer.json" not in edits:
            decoder = {str(item["id"]): {key: value for key, value in item.items() if key != "id"} for item in entries}
            edits[path.name] = data, {**data, "added_tokens_decoder": {**before, **decoder}}
    for name, (old, new) in edits.items():
        write_json(target / name, old, new)
    return set(edits)


def _text_keys(config: Mapping[str, Any]) -> list[str]:
    return [key for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)]


def _rows(config: Mapping[str, Any], levels: int = 3) -> int | None:
    found = config.get("vocab_size")
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    nested = [_rows(config[key], levels - 1) for key in _text_keys(config) if levels]
    return next((size for size in nested if size is not None), None)


def _resized(config: dict[str, Any], rows: int, levels: int = 3) -> dict[str, Any]:
    nested = {key: _resized(config[key], rows, levels - 1) for key in _text_keys(config) if levels}
    return {**config, **nested, **({"vocab_size": rows} if "vocab_size" in config or not nested else {})}


def _with_token_ids(config: dict[str, Any], source: Mapping[str, Any], levels: int = 3) -> dict[str, Any]:
    ids = {key: value for key, value in source.items() if key.endswith(_IDS)}
    kept = {key: value for key, value in config.items() if key in ids or not key.endswith(_IDS)}
    nested = [key for key in _text_keys(config) if levels and isinstance(source.get(key), dict)]
    return {**kept, **{key: _with_token_ids(config[key], source[key], levels - 1) for key in nested}, **ids}


# ── shared with chat.py ───────────────────────────────────────────────────────────────────────────────────────────────


def write_json(path: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Write JSON whose content changed; what is the same keeps its bytes.  Raises CheckpointError, OutputError."""
    try:
        if after == before and path.exists():
            return
        text = json.dumps(after, indent=2, ensure_ascii=False) + "\n"
    except RecursionError:
        raise CheckpointError(f"{path}: is nested beyond reason. {AGAIN}") from None
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8.  Raises CheckpointError if the text cannot be that, OutputError if the file cannot be written."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: holds half a surrogate pair, which UTF-8 cannot say: {error.reason}. {AGAIN}") from None
    with explained(path):
        path.write_bytes(data)


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a file of at most ``most`` bytes.  Raises CheckpointError."""
    try:
        if (size := path.stat().st_size) > most:
            raise CheckpointError(f"{path}: {size} bytes of text; at most {most} are read. {AGAIN}")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8: {error}. {AGAIN}") from None
