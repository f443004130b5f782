"""The models that a recipe in mergekit's schema names: paths, revisions, adapters and hub ids."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.folder import from_hub
from eutectic.checkpoint.lora import open_lora
from eutectic.errors import CheckpointError, RecipeError
from eutectic.merge import api
from eutectic.merge.mergekit_schema import Reference
from eutectic.merge.mergekit_values import Reader

Parts = tuple[str, str | None, str | None, str | None]  # path, revision, lora, its revision


class Models:
    """Opens models by reference; ``named`` are the outputs of other documents, which are no paths."""

    def __init__(self, folder: Path, named: Container[str] = ()) -> None:
        """Paths are relative to ``folder``."""
        self.folder, self.named = folder, named

    def open(self, reader: Reader, reference: Reference) -> Checkpoint:
        """Open one.  Raises RecipeError and CheckpointError with the line."""
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
            raise type(error)(f"{reader.where(reference.path)}: {error}") from None

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


def _is_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")
