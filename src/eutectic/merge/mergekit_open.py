"""From a recipe in mergekit's schema to a checkpoint: opens its models, and makes each of its documents a merge of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from eutectic.checkpoint.aligned import aligned
from eutectic.checkpoint.alignment import Alignment
from eutectic.checkpoint.base import Checkpoint
from eutectic.merge.compose import Composed, Outcome
from eutectic.merge.mergekit import MergekitRecipe
from eutectic.merge.mergekit_merge import Merger, located
from eutectic.merge.mergekit_models import Models
from eutectic.merge.mergekit_schema import Document
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


def open_recipe(recipe: MergekitRecipe, result: Document, folder: Path) -> Composed:
    """See ``MergekitRecipe.open``; ``result`` is the recipe's."""
    return _Opener(recipe, result, folder).composed()


class _Opener:
    def __init__(self, recipe: MergekitRecipe, result: Document, folder: Path) -> None:
        self.recipe, self.result = recipe, result
        self.named = {document.name: document for document in recipe.documents if document.name is not None}
        self.models = Models(folder, self.named)
        self.notes: list[str] = []
        self.tokenizers: dict[str, Tokenizer | None] = {}
        self.aligned: dict[str | None, tuple[Tokenizer, Alignment]] = {}

    def composed(self) -> Composed:
        """The result over all models that it needs, each opened once."""
        recipe, inputs = self.recipe, dict[str, Checkpoint]()
        used = list(self._needed(self.result, ()))
        try:
            for document in used:
                for reference in document.references():
                    if reference.text not in inputs and reference.text not in self.named:
                        inputs[reference.text] = self.models.open(document.reader, reference)
            composed = Composed(
                inputs,
                lambda models: self._built(self.result, models),
                method=", ".join(recipe.methods),
                chat_template=self._template(self.result, inputs),
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
