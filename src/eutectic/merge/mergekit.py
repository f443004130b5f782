"""Recipes in mergekit's YAML schema: one document or a stream of them.

``parse_mergekit`` checks all that can be checked without a model; ``MergekitRecipe.open`` the rest, without a tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from eutectic.errors import RecipeError
from eutectic.merge.compose import Composed
from eutectic.merge.mergekit_moe import MoeDocument, is_moe, open_moe, read_moe
from eutectic.merge.mergekit_schema import Document, read_document
from eutectic.merge.mergekit_values import Reader
from eutectic.merge.recipe import documents, plain
from eutectic.merge.vocabularies import TokenizerSpec

__all__ = ["MergekitRecipe", "TokenizerSpec", "is_mergekit", "parse_mergekit"]


@dataclass(frozen=True)
class MergekitRecipe:
    """A recipe in mergekit's schema; ``documents`` in the stream's order, ``result`` the one whose output is saved.

    A mixture of experts stands alone: it is the result, and there are no documents.
    """

    source: str
    compat: bool
    documents: tuple[Document, ...]
    result: Document | MoeDocument
    data: tuple[dict[str, Any], ...]

    @property
    def _all(self) -> tuple[Document | MoeDocument, ...]:
        return self.documents or (self.result,)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it names, each once."""
        return tuple(dict.fromkeys(document.method for document in self._all))

    @property
    def base_models(self) -> tuple[str, ...]:
        """The base of the result, for the model card."""
        return (self.result.base.text,) if self.result.base is not None else ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was ignored and why, a line each."""
        return tuple(note for document in self._all for note in document.reader.notes)

    def canonical_json(self) -> str:
        """Sorted keys, no spaces: documents that say the same in another order or layout give equal text."""
        return json.dumps(self.as_data(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def sha256(self) -> str:
        """Hash of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The documents as YAML, without comments."""
        stream = io.StringIO()
        writer = YAML(typ="safe", pure=True)
        writer.default_flow_style = None
        writer.sort_base_mapping_type_on_output = False
        writer.dump_all(list(self.data), stream)
        return stream.getvalue()

    def as_data(self) -> dict[str, Any]:
        """The recipe as JSON-ready data."""
        return {"mergekit": list(self.data), "compat": "mergekit" if self.compat else None}

    def open(self, folder: Path = Path()) -> Composed:
        """Open what it names, paths relative to ``folder``, and bind; no tensor is read.

        Raises RecipeError, ParameterError and LayoutError with the line, CheckpointError for a model.
        """
        from eutectic.merge.mergekit_open import open_recipe

        if isinstance(self.result, MoeDocument):
            return open_moe(self, self.result, folder)
        return open_recipe(self, self.result, folder)


def is_mergekit(found: list[Any]) -> bool:
    """Whether a stream of YAML documents is in mergekit's schema, its MoE schema included."""
    return any(isinstance(document, Mapping) and ("merge_method" in document or is_moe(document)) for document in found)


def parse_mergekit(text: str, source: str = "recipe", compat: bool = False) -> MergekitRecipe:
    """Read a recipe in mergekit's schema.

    ``compat`` turns unknown keys from errors into notes, and selects mergekit's conventions where they differ from the
    papers'.  Raises RecipeError, UnknownNameError with ``source:line`` and the nearest word for one that is misspelt.
    """
    found = documents(text, source)
    read = []
    for document in found:
        if not isinstance(document, CommentedMap):
            raise RecipeError(f"{source}:1: a recipe is a mapping with a `merge_method:`")
        if is_moe(document):
            reader = Reader(document, source, compat)
            if len(found) > 1:
                raise reader.error(["experts"], "a mixture of experts stands alone: save the other documents' outputs first")
            return MergekitRecipe(source, compat, (), read_moe(reader), (plain(document),))
        read.append(read_document(Reader(document, source, compat)))
    if not read:
        raise RecipeError(f"{source}:1: a recipe is a mapping with a `merge_method:`")
    names: dict[str, Document] = {}
    for document in read:
        if document.name is not None and names.setdefault(document.name, document) is not document:
            raise document.reader.error(["name"], f"two documents are called {document.name!r}")
    unnamed = [document for document in read if document.name is None]
    if len(unnamed) > 1:
        raise unnamed[1].reader.error([], "two documents have no `name`; only the one that is the result may lack it")
    return MergekitRecipe(source, compat, tuple(read), (unnamed or read)[-1], tuple(plain(document) for document in found))
