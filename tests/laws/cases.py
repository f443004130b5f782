"""The models that the laws are tried on, and what each method declares.

A method that is not in ``CASES`` is held to every law with its defaults.  If a law does not hold for it, or needs other
parameters, say so here: that is the declaration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eutectic import registry
from eutectic.methods._method import build

Parameters = Mapping[str, Any]
Tensors = dict[str, Tensor]
NAMES = list(registry.names("methods"))


@dataclass(frozen=True)
class Case:
    """What a method declares.  ``None`` in place of parameters: the law does not hold for it."""

    #: every streaming law is tried with each of these
    variants: tuple[Parameters, ...] = ({},)
    #: parameters with which a single expert comes back
    alone: Parameters | None = field(default_factory=dict)
    #: parameters with which K identical experts θ₀ + τ give θ₀ + gain(K) τ
    identical: Parameters | None = field(default_factory=dict)
    gain: Callable[[int], float] = lambda k: 1.0
    #: parameters with which the order of the named experts does not matter
    unordered: Parameters | None = field(default_factory=dict)
    #: parameters that take the float16 weights 10,000, 60,000, 50,000 out of its range; None: no parameters can
    overflow: Parameters | None = None


SIGNED = {"weights": [0.5, -1.0, 2.0]}
NINE = {"weights": [0.1 * k - 0.3 for k in range(9)]}
PAIRS = ({"weights": [0.2, 0.6]}, {"weights": [-2.0, 3.0]})

CASES = {
    "average": Case(variants=({}, SIGNED, NINE), overflow={"weights": [-1.0, 1.0, 1.0]}),
    "task_arithmetic": Case(
        variants=({}, {"scale": -0.7}, SIGNED, NINE),
        alone={"scale": 1},
        identical={"scale": 0.3},
        gain=lambda k: 0.3 * k,  # it adds task vectors, and does not average them
        overflow={"scale": 1e6},
    ),
    "ties_sum": Case(
        variants=({}, {"over": "tensor"}, SIGNED | {"density": 0.3}, NINE | {"over": "tensor"}),
        alone={"density": 1, "scale": 1},
        identical={"density": 1, "scale": 0.3},
        gain=lambda k: 0.3 * k,
        overflow={"scale": 1e6},
    ),
    "ties": Case(
        variants=({}, {"over": "tensor"}, {"density": 0.001, "over": "tensor", "scale": 2}, {"density": 1}, {"density": 0}),
        alone={"density": 1},
        identical={"density": 1},
        overflow={"scale": 1e6},
    ),
    "dare": Case(
        variants=({}, {"density": 0.1, "seed": 7}, {"density": 1}),
        alone={"density": 1, "scale": 1},
        identical={"density": 1, "scale": 0.3},
        gain=lambda k: 0.3 * k,
        overflow={"scale": 1e6},
    ),
    "slerp": Case(
        variants=({}, {"t": 0.2}, {"t": 1.5}),
        alone=None,  # it takes two
        unordered={"t": 0.5},  # t is measured from the first
        overflow={"t": 3.0},
    ),
    "iso_c": Case(alone=None, identical=None),  # even one spectrum is flattened
    "tsv_m": Case(identical=None),  # of each expert only a share of the directions is kept
    "nuslerp": Case(variants=({}, *PAIRS), alone=None, overflow=PAIRS[1]),  # it takes two
    "nuslerp_delta": Case(variants=({}, *PAIRS), alone=None, overflow=PAIRS[1]),
    "nuslerp_rows": Case(variants=({}, *PAIRS), alone=None, overflow=PAIRS[1]),
    "nuslerp_rows_delta": Case(variants=({}, *PAIRS), alone=None, overflow=PAIRS[1]),
    "nuslerp_columns": Case(variants=({}, *PAIRS), alone=None, overflow=PAIRS[1]),
    "nuslerp_columns_delta": Case(variants=({}, *PAIRS), alone=None, overflow=PAIRS[1]),
    "multislerp": Case(variants=({}, SIGNED, NINE), overflow=PAIRS[1]),
    "multislerp_delta": Case(variants=({}, SIGNED, NINE), overflow=PAIRS[1]),
    "karcher": Case(variants=({}, {"weights": [1, 2, 0]})),
    "model_stock": Case(alone=None),  # the angle is between two
    "model_stock_rows": Case(alone=None),
    "nearswap": Case(variants=({}, {"t": 0.5}), alone={"t": 1e200}, identical={"t": 1e200}),  # it stays between the two
    "passthrough": Case(variants=({}, {"scale": -0.7}), overflow={"scale": 1e6}),
    "magmax": Case(variants=({}, {"scale": -0.7}), alone={"scale": 1}, identical={"scale": 1}, overflow={"scale": 1e6}),
    "sce": Case(variants=({}, {"density": 0.3, "count": "down", "balanced": "positive"}, {"density": 0})),
    "arcee_fusion": Case(alone=None, unordered=None),  # the first of two is what the second is compared with
    "pcb": Case(
        variants=({}, {"density": 0.3, "over": "tensor"}, {"density": 1}, {"density": 0}),
        alone=None,  # magnitudes are clipped, and the least of those kept has weight 0
        identical=None,
        overflow={"scale": 1e6},
    ),
    "dare_ties": Case(
        variants=({}, {"density": [0.1, 0.5, 1], "seed": 7, "scale": 2}, {"density": 0.9, **SIGNED}),
        alone={"density": 1},
        identical={"density": 1},
        overflow={"density": 1, "scale": 1e6},
    ),
    "della": Case(
        variants=({}, {"density": [0.1, 0.5, 1], "epsilon": 0.05, "seed": 7}, {"density": 0.9, **SIGNED}),
        alone={"density": 1},
        identical={"density": 1},
        overflow={"density": 1, "scale": 1e6},
    ),
    "della_linear": Case(
        variants=({}, {"density": [0.1, 0.5, 1], "epsilon": 0.05, "seed": 7}, {"density": 0.9, **SIGNED}),
        alone={"density": 1, "scale": 1},
        identical={"density": 1, "scale": 0.3},
        gain=lambda k: 0.3 * k,
        overflow={"density": 1, "scale": 1e6},
    ),
    "breadcrumbs": Case(
        variants=({}, {"density": [0.1, 0.5, 0.9], "gamma": 0.1}, {"density": 0, "gamma": 0}, {"gamma": 0.3, **SIGNED}),
        alone={"density": 1, "gamma": 0, "scale": 1},
        identical={"density": 1, "gamma": 0, "scale": 0.3},
        gain=lambda k: 0.3 * k,
        overflow={"scale": 1e6},
    ),
    "breadcrumbs_ties": Case(
        variants=({}, {"density": [0.1, 0.5, 0.9], "gamma": 0.1}, {"density": 1, "gamma": 0}, {"gamma": 0.3, **SIGNED}),
        alone={"density": 1, "gamma": 0},
        identical={"density": 1, "gamma": 0},
        overflow={"scale": 1e6},
    ),
    "ram": Case(
        variants=({}, {"epsilon": 0.3, "scale": 2}), alone={"epsilon": 0}, identical={"epsilon": 0}, overflow={"scale": 1e6}
    ),
    "ramplus_tl": Case(
        variants=({}, {"r": 2, "alpha": 1.5, "epsilon": 0.3}, {"r": 0}),
        alone={"epsilon": 0},
        identical={"epsilon": 0},
        overflow={"scale": 1e6},
    ),
    "consensus": Case(
        variants=({}, {"threshold": [0.2, 0.4, 0.6], "agree": 1}, {"threshold": 0, "agree": 3, "scale": 1}),
        alone={"agree": 1, "scale": 1},
        identical={"scale": 0.3},  # with a threshold up to 1 / (K − 1) all are kept
        gain=lambda k: 0.3 * k,
        overflow={"scale": 1e6},
    ),
    "emr": Case(variants=({}, {"expert": "expert 1"}, {"expert": "expert 2"})),
    "cabs": Case(
        variants=({}, {"n": 1, "m": 3}, {"n": 5, "m": 40, **SIGNED}),
        alone={"n": 4, "m": 4},
        identical={"n": 4, "m": 4},  # the first takes all
        unordered=None,  # the first has the first choice
        overflow={"scale": 1e6},
    ),
    "iso_cts": Case(
        variants=({}, {"common": 0.3}), alone=None, identical=None, overflow={"scale": 1e6}
    ),  # it flattens the spectrum
    "wudi": Case(variants=({}, {"time": 30, "scale": 0.5}), identical={"time": 1e12}, overflow={"scale": 1e6}),
    "aswudi": Case(identical=None, overflow={"scale": 1e6}),  # along the weak directions it is the sum
    "lines": Case(
        variants=({}, {"parameters": {"scale": 1}, "alpha": -0.3, "beta": 2}),
        alone={"parameters": {"scale": 1}, "alpha": 1, "beta": 0},
        identical={"parameters": {"scale": 0.5}, "alpha": 1, "beta": 0},
        gain=lambda k: 0.5 * k,
        overflow={"alpha": 1e6},
    ),
    "svc": Case(
        variants=({}, {"parameters": {"scale": 1}, "alpha": 1}),
        alone={"parameters": {"scale": 1}},
        identical={"parameters": {"scale": 1 / 3}},
        overflow={"parameters": {"scale": 1e6}},
    ),
}


def case(name: str) -> Case:
    return CASES.get(name, Case())


def size(name: str, parameters: Parameters, wanted: int = 3) -> int:
    """The number of experts to try: the wanted one if the method lets us."""
    least, most = build(name, parameters).experts
    return max(least, wanted if most is None else min(wanted, most))


def runs() -> list[tuple[str, Parameters, int]]:
    """Every (method, variant, wanted number of experts) of the streaming laws.

    The first variant gets nine experts: sums of four and more are where vectorised orders of addition differ.
    """
    return [(name, parameters, 3 if i else 9) for name in NAMES for i, parameters in enumerate(case(name).variants)]


def run_id(run: object) -> str | None:
    if not isinstance(run, tuple):
        return None
    name, parameters, _ = run
    said = {key: f"{len(value)} numbers" if isinstance(value, list) else value for key, value in parameters.items()}
    return f"{name}({', '.join(f'{key}={value}' for key, value in said.items())})"


#: all the shapes and dtypes that weights come in; several chunks of 4,096, none a multiple of it
SHAPES = {
    "embed.weight": ((97, 131), torch.float32),
    "norm.weight": ((7,), torch.float32),
    "block.qkv": ((3, 50, 41), torch.bfloat16),
    "block.conv": ((4, 3, 5, 5), torch.float16),
    "block.double": ((65, 129), torch.float64),
    "scale": ((), torch.float32),
    "one": ((1,), torch.bfloat16),
    "one_row": ((1, 5000), torch.float32),
    "empty": ((0, 4), torch.float32),
}
INTEGERS = ("positions", "mask", "steps", "pixels")


def base_model() -> Tensors:
    """Floats of all kinds (one not contiguous), integers and booleans; a new dict over shared tensors: do not write."""
    return dict(_base_model())


@functools.cache
def _base_model() -> Tensors:
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, (shape, dtype) in SHAPES.items()}
    tensors["transposed"] = torch.randn(40, 30, generator=random).T
    tensors |= {
        "positions": torch.arange(12).view(1, 12),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.tensor(5, dtype=torch.int64),
        "pixels": torch.arange(6, dtype=torch.uint8),
    }
    return tensors


def experts_of(k: int) -> dict[str, Tensors]:
    """Named fine-tunes of the base; new dicts over shared tensors."""
    return {f"expert {i}": expert_of(i) for i in range(k)}


def expert_of(seed: int) -> Tensors:
    return dict(_expert_of(seed))


@functools.cache
def _expert_of(seed: int) -> Tensors:
    """In every second tensor half of the entries are untouched, and changes are in sixteenths, so that magnitudes tie."""
    random = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for i, (name, tensor) in enumerate(_base_model().items()):
        if not tensor.is_floating_point():
            tensors[name] = tensor.clone()
            continue
        change = torch.randn(tensor.shape, generator=random)
        if i % 2:
            change = (change * 8).round() / 16 * (torch.rand(tensor.shape, generator=random) < 0.5)
        tensors[name] = (tensor.double() + change.double()).to(tensor.dtype)
    return tensors


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return found.dtype == wanted.dtype and found.shape == wanted.shape and _bytes(found) == _bytes(wanted)


def differing(found: Tensors, wanted: Tensors) -> list[str]:
    """The names of the tensors that are not the same, bit for bit."""
    assert list(found) == list(wanted)
    return [name for name in wanted if not same(found[name], wanted[name])]


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
