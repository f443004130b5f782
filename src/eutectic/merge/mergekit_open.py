"""From a recipe in mergekit's schema to a checkpoint: opens its models, and makes each of its documents a merge of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from eutectic.checkpoint.aligned import aligned
from eutectic.checkpoint.alignment import Alignment
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.folder import from_hub
from eutectic.checkpoint.lora import open_lora
from eutectic.errors import CheckpointError, RecipeError
from eutectic.merge import api
from eutectic.merge.compose import Composed, Outcome
from eutectic.merge.mergekit import MergekitRecipe
from eutectic.merge.mergekit_merge import Merger, located
from eutectic.merge.mergekit_schema import Document, Reference
from eutectic.merge.slices import relayered
from eutectic.merge.vocabularies import (
    Tokenizer,
    TokenizerSpec,
    align,
    chat_template,
    require_one_vocabulary,
    tokenizer_of,
)

_BLOCKS = ("tokenizer", "tokenizer_source")  # the one that a document lacks is passed over
Parts = tuple[str, str | None, str | None, str | None]  # path, revision, lora, its revision


def open_recipe(recipe: MergekitRecipe, folder: Path) -> Composed:
    """See ``MergekitRecipe.open``."""
    return _Opener(recipe, folder).composed()


class _Opener:
    def __init__(self, recipe: MergekitRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.named = {document.name: document for document in recipe.documents if document.name is not None}
        self.notes: list[str] = []
        self.tokenizers: dict[str, Tokenizer | None] = {}
        self.aligned: dict[str | None, tuple[Tokenizer, Alignment]] = {}

    def composed(self) -> Composed:
        """The result over all models that it needs, each opened once."""
        recipe, inputs = self.recipe, dict[str, Checkpoint]()
        used = list(self._needed(recipe.result, ()))
        try:
            for document in used:
                for reference in document.references():
                    if reference.text not in inputs and reference.text not in self.named:
                        inputs[reference.text] = self._open(document, reference)
            composed = Composed(
                inputs,
                lambda models: self._built(recipe.result, models),
                method=", ".join(recipe.methods),
                chat_template=self._template(recipe.result, inputs),
            )
            self._check_config(composed)
        except BaseException:
            for checkpoint in inputs.values():
                checkpoint.close()
            raise
        unused = [document for document in recipe.documents if document not in used]
        self.notes += [f"{document.reader.where(['name'])}: {document.name!r} is used by no document" for document in unused]
        composed.notes = tuple(dict.fromkeys((*recipe.notes, *self.notes)))
        return composed

    def _needed(self, document: Document, above: tuple[str, ...]) -> Iterator[Document]:
        """A document and those that it is made of, without circles."""
        path = (*above, document.name or "the result")
        for reference in document.references():
            inner = self.named.get(reference.text)
            if inner is not None:
                if reference.text in path:
                    raise document.reader.error(reference.path, f"{' needs '.join((*path, reference.text))}: a circle")
                yield from self._needed(inner, path)
        yield document

    def _built(self, document: Document, models: Mapping[str, Checkpoint]) -> Outcome:
        """A document's output over opened models, and over the outputs of others."""
        texts = dict.fromkeys(reference.text for reference in document.references())
        inner = {text: self._built(self.named[text], models) for text in texts if text in self.named}
        mine = {text: inner[text].checkpoint if text in inner else models[text] for text in texts}
        tokenizers = {text: inner[text].tokenizer if text in inner else self._tokenizer(text, models[text]) for text in texts}
        if document.tokenizer is not None:
            with located(document.reader.where(_BLOCKS)):
                tokenizer, alignment = self._alignment(document, document.tokenizer, tokenizers)
                mine = dict(aligned(mine, alignment))
            return Merger(document, mine, self.notes).outcome(inner)._replace(tokenizer=tokenizer)
        merger = Merger(document, mine, self.notes)
        outcome = merger.outcome(inner)
        with located(document.reader.where(["merge_method"])):
            require_one_vocabulary({text: tokenizers[text] for text in texts if text in merger.speakers})
        return outcome._replace(tokenizer=tokenizers[merger.first.text])

    # ── tokenizers ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokenizer(self, text: str, model: Checkpoint) -> Tokenizer | None:
        """A model's tokenizer, whose files are read once however often the recipe is built."""
        if text not in self.tokenizers:
            self.tokenizers[text] = tokenizer_of(model)
        return self.tokenizers[text]

    def _alignment(
        self, document: Document, spec: TokenizerSpec, tokenizers: Mapping[str, Tokenizer | None]
    ) -> tuple[Tokenizer, Alignment]:
        """A document's tokenizer and how its models get there, planned once."""
        if document.name not in self.aligned:
            base = document.base.text if document.base is not None else None
            self.aligned[document.name] = found = align(spec, tokenizers, base, self.recipe.compat)
            where = document.reader.where(_BLOCKS)
            self.notes += [f"{where}: {note}" for note in found[1].notes]
        return self.aligned[document.name]

    def _template(self, document: Document, inputs: Mapping[str, Checkpoint]) -> str | None:
        """The text of the output's chat template, if the recipe says that it gets one."""
        if document.chat_template is None:
            return None
        where = document.reader.where(["chat_template"])
        tokenizers = {text: self._tokenizer(text, model) for text, model in inputs.items()}
        with located(where):
            found = chat_template(document.chat_template, tokenizers, document.base.text if document.base is not None else None)
        if found is None:
            self.notes.append(f"{where}: no model has a chat template, so the output has none")
        return found

    # ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, document: Document, reference: Reference) -> Checkpoint:
        try:
            path, revision, lora, lora_revision = self._split(reference)
            if lora is not None and path in self.named:
                raise RecipeError(f"{lora!r} cannot be applied to {path!r}, which this recipe makes; save that first")
            local = self._local(path, revision)
            model = api.open(local if local is not None else f"{path}@{revision}" if revision else path)
            if lora is None:
                return model
            try:
                local = self._local(lora, lora_revision)
                if local is None and not _is_hub_id(lora):
                    raise CheckpointError(f"{lora}: no such file or folder. Check the path.")
                return open_lora(local if local is not None else from_hub(lora, lora_revision), model)
            except BaseException:
                model.close()
                raise
        except (RecipeError, CheckpointError) as error:
            raise type(error)(f"{document.reader.where(reference.path)}: {error}") from None

    def _split(self, reference: Reference) -> Parts:
        """``path[@revision][+lora[@revision]]``; what is there under the whole of its name is a path."""
        if reference.parts is not None:
            return reference.parts
        text = reference.text
        if self._exists(text):
            return text, None, None, None
        splits = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "+" and 0 < i < len(text) - 1]
        known = [split for split in splits if self._is_known(split[0])]
        both = [split for split in known or splits if self._is_known(split[1])]
        if not splits:
            return (*self._revision(text), None, None)
        model, lora = (both or known or splits)[0]
        return (*self._revision(model), *self._revision(lora))

    def _is_known(self, text: str) -> bool:
        path, _ = self._revision(text)
        return self._exists(path) or path in self.named

    def _revision(self, text: str) -> tuple[str, str | None]:
        if self._exists(text):
            return text, None
        splits = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "@" and 0 < i < len(text) - 1]
        path, revision = ([split for split in splits if self._exists(split[0])] or splits or [(text, None)])[0]
        return path, revision

    def _exists(self, text: str) -> bool:
        try:
            return (self.folder / text).exists()
        except OSError:  # too long for a file name
            return False

    def _local(self, path: str, revision: str | None) -> Path | None:
        if not self._exists(path):
            return None
        if revision is not None:
            raise RecipeError(f"{path!r} is a local path, which has no revision {revision!r}")
        return self.folder / path

    def _check_config(self, composed: Composed) -> None:
        """Note a number of layers that the donor's config does not tell; saving cannot correct it."""
        donor = composed.inputs[composed.donor]
        path = donor.files[-1].parent / "config.json" if donor.files else None
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        except (OSError, ValueError):
            return  # there is none, or saving says what is wrong with it
        for prefix in relayered(config, composed.layers)[1]:
            count = len(composed.layers[prefix].layers)
            self.notes.append(f"{path}: the number of layers of {prefix!r} is not found; set it to {count} in the output's")


def _is_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")
