"""Sparse up-cycling: dense models of one shape as the experts of a mixture, streamed, with the hub's names.

Attention, norms, embeddings and head are the base's; the MLPs are the experts'; a router in each layer picks k of E.
Source: Komatsuzaki et al., "Sparse upcycling: training mixture-of-experts from dense checkpoints", ICLR 2023.

A layer's MLP becomes Σ w_e MLP_e(x) over the k experts with the highest logits gate · x, w their softmax over these k (for the
Qwen families this needs ``norm_topk_prob``, which is set), and with a shared expert + σ(gate_s · x) MLP_s(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Spread
from eutectic.checkpoint.spec import Layout, TensorSpec, require_same_layout
from eutectic.errors import LayoutError, NonFiniteError
from eutectic.merge.gates import Gates, Rows, gaussian
from eutectic.merge.slices import place_of
from eutectic.methods._native import finite

_STACK = "model.layers"
_MLP = tuple(f"mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj"))
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_LAYER = ("input_layernorm.weight", "post_attention_layernorm.weight")
_LAYER += tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
#: what old checkpoints hold and models compute by themselves
_COMPUTED = "rotary_emb.inv_freq"
_SEED = 0


class Family(NamedTuple):
    """One architecture of mixtures: which dense models fit, and how its tensors are called.

    ``layer`` are the tensors of a dense layer but its MLP's; ``parts`` is how the MLP's are called in an expert.
    """

    name: str
    title: str
    model_type: str
    architecture: str
    dense: tuple[str, ...]
    layer: tuple[str, ...]
    block: str
    parts: Mapping[str, str]
    shared: bool = False


FAMILIES = (
    Family(
        "mixtral",
        "Mixtral",
        "mixtral",
        "MixtralForCausalLM",
        ("llama", "mistral"),
        _LAYER,
        "block_sparse_moe",
        dict(zip(_MLP, ("w1.weight", "w3.weight", "w2.weight"), strict=True)),
    ),
    Family(
        "qwen_moe",
        "Qwen2-MoE",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        ("qwen2",),
        (*_LAYER, *(f"self_attn.{part}_proj.bias" for part in "qkv")),
        "mlp",
        {name: name.removeprefix("mlp.") for name in _MLP},
        True,
    ),
    Family(
        "qwen3_moe",
        "Qwen3-MoE",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ("qwen3",),
        (*_LAYER, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        "mlp",
        {name: name.removeprefix("mlp.") for name in _MLP},
    ),
)


class Expert(NamedTuple):
    """A dense model whose MLPs are an expert: noise is added to them, and ``scale`` multiplies ``down_proj``."""

    label: str
    checkpoint: Checkpoint
    noise: float = 0.0
    scale: float = 1.0

    def layout(self) -> dict[str, TensorSpec]:
        """Of its MLPs."""
        return _mlps(self.checkpoint.specs)

    @property
    def width(self) -> int:
        """How many neurons its MLPs have."""
        return self.checkpoint.spec(f"{_STACK}.0.{_MLP[0]}").shape[0]


@dataclass(frozen=True)
class Mixture:
    """What the folder of a mixture says beyond its tensors.

    ``config`` makes its config.json of the base's; ``found`` gets what shows only when the gates are made.
    """

    experts: tuple[str, ...]
    parameters: Mapping[str, Any]
    passes: int
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    found: list[str] = field(default_factory=list)


class _Source(NamedTuple):
    checkpoint: Checkpoint
    name: str
    noise: float = 0.0
    scale: float = 1.0


@final
class Upcycled(Checkpoint):
    """A mixture as a lazy checkpoint; it owns nothing.  Random numbers go by tensor name and place, whatever is read when."""

    def __init__(
        self,
        family: Family,
        base: Checkpoint,
        experts: Sequence[Expert],
        shared: Expert | None,
        gates: Gates,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Lay the tensors out; the experts must fit (``require_expert``), and so must the base (``require_dense``)."""
        self.gates = gates
        every = [*experts, *([shared] if shared else [])]
        self.origin = f"{family.name}({', '.join([base.origin, *(expert.checkpoint.origin for expert in every)])})"
        self.files = tuple(dict.fromkeys(file for c in (base, *(e.checkpoint for e in every)) for file in c.files))
        self._sources: dict[str, _Source] = {}
        for name in base.specs:
            place = place_of(name)
            if place is None or place.rest not in _MLP:
                if not name.endswith(_COMPUTED):
                    self._sources[name] = _Source(base, name)
            elif gate_names(family, place.index)[0] not in self._sources:
                self._sources |= _layer(family, place.index, experts, shared, gates)
        kinds = {name: spec.dtype for name, spec in _mlps(base.specs).items()}
        self._specs = {}
        for name, source in self._sources.items():
            spec = source.checkpoint.spec(source.name)
            own = next(iter(kinds.values())) if source.checkpoint is gates else spec.dtype
            self._specs[name] = TensorSpec(spec.shape, dtype or own)

    @property
    def specs(self) -> Layout:
        """The base's tensors in their order, with router and experts in the MLPs' place."""
        return self._specs

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """Make the gates if one is among them."""
        if any(self._sources[name].checkpoint is self.gates for name in names):
            self.gates.make()

    def grain(self, name: str) -> int:
        """As the source's."""
        source = self._sources[name]
        return source.checkpoint.grain(source.name)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        source, dtype = self._sources[name], self._specs[name].dtype
        x = source.checkpoint.read_flat(source.name, start, stop)
        if not finite(x):
            raise NonFiniteError(f"{source.checkpoint.origin}: holds a NaN or Inf in {source.name!r}; repair or drop it")
        if source.noise or source.scale != 1:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            if source.noise:
                wide = wide + source.noise * gaussian((_SEED, "noise", name), start, stop - start)
            x = wide * source.scale
        result = x.to(dtype)
        if not finite(result):
            raise NonFiniteError(f"{name!r} overflows {dtype}; choose a wider dtype, less noise or a smaller scale")
        return result


def gate_names(family: Family, layer: int) -> tuple[str, ...]:
    """The router's tensor, and that of the shared expert's gate if the family has one."""
    prefix = f"{_STACK}.{layer}.{family.block}"
    return (f"{prefix}.gate.weight", *([f"{prefix}.shared_expert_gate.weight"] if family.shared else []))


def gate_rows(family: Family, layers: int, experts: int) -> dict[str, Rows]:
    """The gates of all layers; the row after the experts' is the shared one's."""
    ends = [(0, experts), (experts, experts + 1)]
    return {
        name: Rows(layer, *at) for layer in range(layers) for name, at in zip(gate_names(family, layer), ends, strict=False)
    }


def require_dense(family: Family, base: Checkpoint) -> int:
    """The number of layers of a base that fits.  Raises LayoutError with the first tensor that has no place, or is missing."""
    layers: dict[int, set[str]] = {}
    for name in base.specs:
        place = place_of(name)
        known = (*family.layer, *_MLP)
        if place is not None and place.stack == _STACK and place.rest in known:
            layers.setdefault(place.index, set()).add(place.rest)
        elif name not in _OUTSIDE and not name.endswith(_COMPUTED):
            raise LayoutError(f"{base.origin}: {name!r} has no place in a {family.title} model")
    if "model.embed_tokens.weight" not in base.specs or sorted(layers) != list(range(len(layers))) or not layers:
        raise LayoutError(f"{base.origin}: is no language model with layers `{_STACK}.0` and on")
    for index, found in layers.items():
        for rest in (*family.layer, *_MLP):
            if rest not in found:
                raise LayoutError(f"{base.origin}: has no {_STACK}.{index}.{rest}, which a {family.title} model needs")
    return len(layers)


def require_expert(base: Checkpoint, expert: Expert, *, any_float: bool, any_width: bool = False) -> Expert:
    """The expert, if its MLPs fit the base's; a shared one may have ``any_width``.  Raises LayoutError."""
    wanted, found = _mlps(base.specs), expert.layout()
    first = found.get(f"{_STACK}.0.{_MLP[0]}")
    if any_width and first is not None:
        wanted = {name: spec._replace(shape=_widened(name, spec.shape, first.shape[0])) for name, spec in wanted.items()}
    who = f"expert {expert.label!r} ({expert.checkpoint.origin})"
    require_same_layout(wanted, found, "the base", who, any_float=any_float)
    return expert


def _widened(name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    return (shape[0], width) if name.endswith(_MLP[2]) else (width, *shape[1:])


def _mlps(specs: Layout) -> dict[str, TensorSpec]:
    """The tensors of the MLPs, biases and all."""
    places = {name: place_of(name) for name in specs}
    return {name: specs[name] for name, place in places.items() if place and place.rest.startswith("mlp.")}


def _layer(
    family: Family, index: int, experts: Sequence[Expert], shared: Expert | None, gates: Gates
) -> Iterator[tuple[str, _Source]]:
    """Router and experts of one layer."""
    prefix = f"{_STACK}.{index}.{family.block}"
    for name in gate_names(family, index):
        yield name, _Source(gates, name)
    for number, expert in enumerate(experts):
        for old, new in family.parts.items():
            yield f"{prefix}.experts.{number}.{new}", _part(expert, index, old)
    if shared is not None:
        for old, new in family.parts.items():
            yield f"{prefix}.shared_expert.{new}", _part(shared, index, old)


def _part(expert: Expert, index: int, old: str) -> _Source:
    scale = expert.scale if old == _MLP[2] else 1.0
    return _Source(expert.checkpoint, f"{_STACK}.{index}.{old}", expert.noise, scale)
