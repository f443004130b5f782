"""mergekit's schema for mixtures of experts: dense models up-cycled into a sparse one, see ``upcycle`` and ``gates``.

    base_model: org/chat-7b          # its attention, norms, embeddings, config and tokenizer
    gate_mode: hidden                # or hidden_last, hidden_avg, cheap_embed, random, uniform_random
    experts_per_token: 2
    experts:
      - source_model: org/math-7b
        positive_prompts: ["Solve the equation"]
        negative_prompts: ["Write a poem"]
        noise_scale: 0.01            # standard deviation of what is added to its MLPs
        residual_scale: 0.9          # multiplies its down_proj
    shared_experts: […]              # exactly one, of the same form, in a Qwen2-MoE

Differs from mergekit in: the hub's tensor names, which every reader knows; gates see what routers will see (``gates``); there
is no DeepSeek architecture, which needs code from a repository.  A shared expert without prompts has a gate of zeros, whatever
the mode: it counts one half.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eutectic.checkpoint._files import read_json
from eutectic.checkpoint.base import Checkpoint
from eutectic.errors import CheckpointError, did_you_mean
from eutectic.merge.compose import Composed, Outcome
from eutectic.merge.gates import MAX_CONDITION, MODES, PROMPTED, Gates, Prompts, condition, direction, drawn
from eutectic.merge.mergekit_merge import located
from eutectic.merge.mergekit_schema import Reference, read_dtype, read_reference
from eutectic.merge.mergekit_values import Path, Reader
from eutectic.merge.router_inputs import EMBEDDING, prompt_vectors
from eutectic.merge.upcycle import Expert, Mixture, Upcycled, gate_names, gate_rows, require_dense, require_expert
from eutectic.merge.upcycle_config import family_for, mixture_config
from eutectic.merge.vocabularies import tokenizer_of

if TYPE_CHECKING:
    from eutectic.merge.mergekit import MergekitRecipe

_TOP = ("base_model", "gate_mode", "architecture", "dtype", "experts_per_token", "experts", "shared_experts")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")


@dataclass(frozen=True)
class ExpertSpec:
    """One expert as the recipe has it."""

    model: Reference
    prompts: Prompts
    noise: float
    scale: float
    path: Path


@dataclass(frozen=True)
class MoeDocument:
    """One mixture as the recipe has it."""

    reader: Reader
    base: Reference
    mode: str
    architecture: str | None
    dtype: str | None
    active: int
    experts: tuple[ExpertSpec, ...]
    shared: ExpertSpec | None
    method: str = "moe"

    def references(self) -> list[Reference]:
        """All models that it names, the base first."""
        return [self.base, *(spec.model for spec in self.every())]

    def every(self) -> list[ExpertSpec]:
        """The experts, the shared one last."""
        return [*self.experts, *([self.shared] if self.shared else [])]


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_moe(document: Mapping[str, Any]) -> bool:
    """Whether a YAML document is in this schema."""
    experts = document.get("experts")
    listed = isinstance(experts, list) and any(isinstance(item, Mapping) and "source_model" in item for item in experts)
    return "merge_method" not in document and (listed or ("gate_mode" in document and "experts" in document))


def read_moe(reader: Reader) -> MoeDocument:
    """Read and check a document.  Raises RecipeError with the line."""
    top = reader.mapping(reader.document, (), _TOP, required=["base_model", "experts"])
    mode = reader.text(top.get("gate_mode", "hidden"), ("gate_mode",))
    if mode not in MODES:
        raise reader.error(["gate_mode"], f"`gate_mode` is {mode!r}.{did_you_mean(mode, MODES)}")
    experts = _experts(reader, top["experts"], "experts")
    active = reader.integer(top.get("experts_per_token", 2), ("experts_per_token",), 1)
    if active > len(experts):
        said = "experts_per_token" if "experts_per_token" in top else "experts"
        raise reader.error([said], f"`experts_per_token` is {active}, and there are {len(experts)} experts")
    for spec in experts if mode in PROMPTED else ():
        if not spec.prompts.positive:
            raise reader.error(spec.path, f"`gate_mode: {mode}` needs `positive_prompts` of each expert")
    shared = _experts(reader, top["shared_experts"], "shared_experts") if top.get("shared_experts") else []
    if len(shared) > 1:
        raise reader.error(["shared_experts", 1], "only one shared expert is possible")
    for spec in shared:
        if spec.prompts.negative and not spec.prompts.positive:
            raise reader.error(spec.path, "`negative_prompts` need `positive_prompts` beside them")
    return MoeDocument(
        reader,
        read_reference(reader, top["base_model"], ("base_model",)),
        mode,
        reader.text(top["architecture"], ("architecture",)) if "architecture" in top else None,
        read_dtype(reader, top),
        active,
        tuple(experts),
        shared[0] if shared else None,
    )


def _experts(reader: Reader, node: Any, key: str) -> list[ExpertSpec]:
    found = []
    for i, item in enumerate(reader.items(node, (key,))):
        path: Path = (key, i)
        body = reader.mapping(item, path, _EXPERT, required=["source_model"])
        prompts = Prompts(*(_texts(reader, body.get(word), (*path, word)) for word in _EXPERT[1:3]))
        noise = _number(reader, body.get("noise_scale", 0.0), (*path, "noise_scale"))
        if noise < 0:
            raise reader.error((*path, "noise_scale"), f"`noise_scale` is a standard deviation from 0 on, not {noise}")
        scale = _number(reader, body.get("residual_scale", 1.0), (*path, "residual_scale"))
        model = read_reference(reader, body["source_model"], (*path, "source_model"))
        found.append(ExpertSpec(model, prompts, noise, scale, path))
    return found


def _texts(reader: Reader, node: Any, path: Path) -> tuple[str, ...]:
    if node is None or node == []:
        return ()
    return tuple(reader.text(item, (*path, i)) for i, item in enumerate(reader.items(node, path)))


def _number(reader: Reader, node: Any, path: Path) -> float:
    if isinstance(node, bool) or not isinstance(node, (int, float)) or not math.isfinite(node):
        raise reader.error(path, f"`{path[-1]}` must be a finite number, not {node!r}")
    return float(node)


# ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_moe(recipe: MergekitRecipe, document: MoeDocument, folder: FilePath) -> Composed:
    """See ``MergekitRecipe.open``; ``document`` is the recipe's result."""
    from eutectic.merge.mergekit_models import Models

    models, inputs, notes = Models(folder), dict[str, Checkpoint](), list(recipe.notes)
    try:
        base, *others = document.references()
        inputs[base.text] = models.open(document.reader, base)
        opener = _Opener(document, inputs[base.text], notes)  # before anything else is downloaded
        for reference in others:
            if reference.text not in inputs:
                inputs[reference.text] = models.open(document.reader, reference)
        composed = Composed(inputs, opener.built, method=opener.family.name)
    except BaseException:
        for checkpoint in inputs.values():
            checkpoint.close()
        raise
    composed.notes = tuple(dict.fromkeys(notes))
    return composed


class _Opener:
    """A document over its base."""

    def __init__(self, document: MoeDocument, base: Checkpoint, notes: list[str]) -> None:
        """Check what needs no tensor; ``notes`` are added to."""
        self.document, self.reader, self.found = document, document.reader, list[str]()
        self.where = self.reader.where(document.base.path)
        with located(self.where):
            self.folder = base.files[-1].parent if base.files else FilePath()
            if not (self.folder / "config.json").is_file():
                raise CheckpointError(f"{base.origin}: no config.json beside it. Give the base as a folder.")
            self.config = read_json(self.folder / "config.json")
        with located(self.reader.where(["architecture"]) if document.architecture else self.where):
            self.family = family_for(self.config, base, document.architecture)
        with located(self.where):
            self.layers = require_dense(self.family, base)
        if self.family.shared != (document.shared is not None):
            where = document.shared.path if document.shared else ["experts"]
            needs = "needs exactly one shared expert: give `shared_experts`" if self.family.shared else "has no shared experts"
            raise self.reader.error(where, f"a {self.family.title} {needs}")
        self.texts = tuple(dict.fromkeys(text for spec in document.every() for texts in spec.prompts for text in texts))
        if document.mode in PROMPTED:
            tokenizer = tokenizer_of(base)
            if tokenizer is None or (tokenizer.digest is None and not any(tokenizer.folder.glob("*.model"))):
                raise self.reader.error(
                    document.base.path, f"`gate_mode: {document.mode}` needs a tokenizer, and {base.origin} has none"
                )
            self.tokenizer = tokenizer.folder
        elif self.texts:
            notes.append(f"{self.reader.where(['gate_mode'])}: `gate_mode: {document.mode}` takes no notice of the prompts")
        if document.shared and not (document.mode in PROMPTED and document.shared.prompts.positive):
            self._note_size(document.shared, notes)

    def built(self, models: Mapping[str, Checkpoint]) -> Outcome:
        """The mixture over opened models, or over views of them."""
        document, base = self.document, models[self.document.base.text]
        made = [self._expert(spec, base, models, shared=spec is document.shared) for spec in document.every()]
        experts = made[: len(document.experts)]
        shared = made[-1] if document.shared else None
        width = base.spec(EMBEDDING).shape[1]
        rows = gate_rows(self.family, self.layers, len(experts))
        gates = Gates(rows, width, lambda: self._gates(base, width))
        dtype = getattr(torch, document.dtype) if document.dtype else None
        config = functools.partial(
            mixture_config, self.family, experts=len(experts), active=document.active, width=experts[0].width, shared=shared
        )
        with located(self.where):
            config(self.config)  # for its errors; the file itself is made when it is written
        mixture = Mixture(
            experts=tuple(expert.label for expert in made),
            parameters={"gate_mode": document.mode, "experts_per_token": document.active},
            passes=2 if document.mode in PROMPTED[:3] else 1,
            config=config,
            found=self.found,
        )
        below = Upcycled(self.family, base, experts, shared, gates, dtype)
        return Outcome(below, document.base.text, {}, tokenizer_of(base), mixture)

    def _expert(self, spec: ExpertSpec, base: Checkpoint, models: Mapping[str, Checkpoint], *, shared: bool) -> Expert:
        expert = Expert(spec.model.text, models[spec.model.text], spec.noise, spec.scale)
        with located(self.reader.where(spec.path)):
            return require_expert(base, expert, any_float=self.document.dtype is not None, any_width=shared)

    def _note_size(self, shared: ExpertSpec, notes: list[str]) -> None:
        """Say by how much the MLPs' outputs grow, if they do."""
        share = 0.5  # σ(0): the shared expert stands behind a gate of zeros
        least, most = (f(spec.scale for spec in self.document.experts) + share * shared.scale for f in (min, max))
        if not (math.isclose(least, 1) and math.isclose(most, 1)):
            sizes = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            notes.append(
                f"{self.reader.where(shared.path)}: routed and shared experts add up to {sizes} times an MLP's output "
                f"(residual_scale of an expert + ½ that of the shared one); 1 keeps the base's size"
            )

    # ── gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _gates(self, base: Checkpoint, width: int) -> Tensor:
        """All gates, ``[layers, experts, width]``, with a row for the shared one."""
        document, experts = self.document, len(self.document.experts)
        if document.mode not in PROMPTED:
            names = [gate_names(self.family, layer)[0] for layer in range(self.layers)]
            gates = torch.stack([drawn(document.mode, name, experts, width) for name in names])
            return torch.cat([gates, torch.zeros(self.layers, 1, width)], dim=1)
        with located(self.where):
            entering = self.reader.compat
            vectors = prompt_vectors(document.mode, base, self.folder, self.tokenizer, self.texts, entering=entering)
        columns = []
        for spec in document.every():
            with located(self.reader.where(spec.path)):
                no_prompts = torch.zeros(1, width, dtype=torch.float64)
                row = direction(spec.prompts, vectors) if spec.prompts.positive else no_prompts
                columns.append(row.expand(self.layers, width))
        self._note_condition(columns[:experts])
        return torch.stack([*columns, *([] if document.shared else [torch.zeros_like(columns[0])])], dim=1)

    def _note_condition(self, columns: Sequence[Tensor]) -> None:
        conditions = [condition(gate) for gate in torch.stack(list(columns), dim=1)]
        bad = [layer for layer, number in enumerate(conditions) if not number <= MAX_CONDITION]
        if bad:
            worst = max(bad, key=lambda layer: conditions[layer])
            self.found.append(
                f"{self.reader.where(['experts'])}: the gates of {len(bad)} of {self.layers} layers tell their experts apart "
                f"badly (condition number {conditions[worst]:.3g} in layer {worst}, above {MAX_CONDITION:g}); "
                "give prompts that differ more, or negative ones"
            )
