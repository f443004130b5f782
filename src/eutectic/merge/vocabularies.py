"""The vocabularies of models that are merged: brought to one where a recipe says how, refused where they differ without."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eutectic.checkpoint.aligned import vocabulary_tensors
from eutectic.checkpoint.alignment import Alignment, plan_alignment, write_tokenizer
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.chat import choose_chat_template
from eutectic.checkpoint.peft import CONFIG_FILE
from eutectic.checkpoint.tokenizer import (
    Vocabulary,
    copy_tokenizer_files,
    has_tokenizer,
    read_vocabulary,
    require_same_vocabulary,
    vocabulary_digest,
)
from eutectic.errors import CheckpointError


@dataclass(frozen=True)
class TokenizerSpec:
    """The output's tokenizer, as ``checkpoint.alignment.plan_alignment`` takes it.

    ``source`` is ``union``, ``base`` or a model as the recipe names it; ``tokens`` are token → ``{source: …, force: true}``
    with a model's name, ``{kind: model_token, model: …, token: … or token_id: …}`` or ``{kind: zero}`` for the source.
    """

    source: str
    tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Tokenizer:
    """Where the tokenizer of a model lies, or of an output what it becomes; files are read when they are needed.

    ``own`` marks an adapter's, which goes before that of the model below it; ``rows`` are the embedding's, for a folder
    without a config.  An output's has ``made``, its vocabulary, and ``alignment``, what is appended to the files in ``folder``.
    """

    folder: Path
    own: bool = False
    rows: int | None = None
    made: Vocabulary | None = None
    alignment: Alignment | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Its tokens and ids.  Raises CheckpointError."""
        if self.made is not None:
            return self.made
        found = read_vocabulary(self.folder)
        return found if found.rows is not None else dataclasses.replace(found, rows=self.rows)

    @cached_property
    def digest(self) -> str | None:
        """Equal for equal files, without parsing them; None if there are none.  Raises CheckpointError."""
        if self.made is not None:
            return f"made {id(self.made)}"
        return vocabulary_digest(self.folder) if has_tokenizer(self.folder) else None

    def write(self, target: Path) -> None:
        """Give a folder, with the side files of the model that it is merged from, this tokenizer where it is another."""
        if self.alignment is not None:
            write_tokenizer(self.alignment, {self.alignment.tokenizer: self.folder}, target)
        elif self.own:
            copy_tokenizer_files(self.folder, target)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer in a model's folder, if it lies in one: an adapter's own, else that of the model it adapts."""
    if not checkpoint.files:
        return None
    first, last = checkpoint.files[0].parent, checkpoint.files[-1].parent
    own = first != last and (first / CONFIG_FILE).is_file() and has_tokenizer(first)
    tensors = [checkpoint.specs[name] for name in vocabulary_tensors(checkpoint.specs)]
    rows = next((spec.shape[0] for spec in tensors if len(spec.shape) == 2), None)
    return Tokenizer(first if own else last, own, rows or None)


def require_one_vocabulary(tokenizers: Mapping[str, Tokenizer | None]) -> None:
    """Refuse models whose rows are other tokens'; those without tokenizer files are not looked at.

    Files that are equal are not parsed.  Raises LayoutError with the first difference, CheckpointError.
    """
    distinct: dict[str, tuple[str, Tokenizer]] = {}
    for name, tokenizer in tokenizers.items():
        if tokenizer is not None and tokenizer.digest is not None:
            distinct.setdefault(tokenizer.digest, (name, tokenizer))
    if len(distinct) > 1:
        require_same_vocabulary({name: tokenizer.vocabulary for name, tokenizer in distinct.values()})


def align(
    spec: TokenizerSpec, tokenizers: Mapping[str, Tokenizer | None], base: str | None, compat: bool = False
) -> tuple[Tokenizer, Alignment]:
    """The output's tokenizer, and the alignment that its models get.

    A model without tokenizer files is taken to have the base's (without a base, the first there is), with a note.
    ``compat`` leaves out the padding if nothing is said of it, as mergekit does.  Raises RecipeError, CheckpointError.
    """
    known, missing = _known(tokenizers, base)
    vocabularies = {name: tokenizer.vocabulary for name, tokenizer in known.items()}
    pad = 1 if compat and spec.pad_to_multiple_of is None else spec.pad_to_multiple_of
    alignment = plan_alignment(base, vocabularies, spec.source, spec.tokens, pad)
    alignment = dataclasses.replace(alignment, notes=(*missing, *alignment.notes))
    chosen = known[alignment.tokenizer]
    added: dict[str, Mapping[str, bool]] = {}
    for vocabulary in (vocabularies[alignment.tokenizer], *vocabularies.values()):
        for token, flags in vocabulary.added.items():
            if token in alignment.tokens:
                added.setdefault(token, flags)
    for item in alignment.extra:
        added.setdefault(item["content"], {key: value for key, value in item.items() if isinstance(value, bool)})
    made = Vocabulary(alignment.tokens, added, alignment.rows, "the aligned vocabulary")
    # what an output is made of may be an output itself, with tokens that its files lack
    below = chosen.alignment.extra if chosen.alignment is not None else ()
    whole = dataclasses.replace(alignment, extra=(*below, *alignment.extra))
    return Tokenizer(chosen.folder, chosen.own, None, made, whole), alignment


def chat_template(choice: str, tokenizers: Mapping[str, Tokenizer | None], base: str | None) -> str | None:
    """The text of the output's chat template; None if ``auto`` finds none.  Raises RecipeError, CheckpointError."""
    folders = {name: tokenizer.folder for name, tokenizer in tokenizers.items() if tokenizer is not None}
    return choose_chat_template(choice, folders, base)


def _known(tokenizers: Mapping[str, Tokenizer | None], base: str | None) -> tuple[dict[str, Tokenizer], list[str]]:
    """The models' tokenizers, none missing, and notes on those that were."""
    there = [name for name, tokenizer in tokenizers.items() if tokenizer is not None and tokenizer.digest is not None]
    stand_in = base if base in there else next(iter(there), None)
    known: dict[str, Tokenizer] = {}
    notes = []
    for name, tokenizer in tokenizers.items():
        # one in a format that is not read is not missing: reading it says what to do
        if name in there or (tokenizer is not None and any(tokenizer.folder.glob("*.model"))):
            found = tokenizer
        else:
            found = tokenizers[stand_in] if stand_in is not None else tokenizer
            if found is not None and found is not tokenizer:
                rows = tokenizer.rows if tokenizer is not None else None
                found = dataclasses.replace(found, made=dataclasses.replace(found.vocabulary, rows=rows))
                notes.append(f"{name} has no tokenizer files, so it is taken to have the vocabulary of {stand_in}")
        if found is None:
            raise CheckpointError(f"{name}: has no folder with a tokenizer. Give the model as a folder.")
        known[name] = found
    return known, notes
