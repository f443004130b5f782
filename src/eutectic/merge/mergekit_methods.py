"""mergekit's methods in terms of ours: which of their parameters is which of ours, for one tensor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eutectic import registry
from eutectic.errors import ParameterError, UnknownNameError, did_you_mean
from eutectic.methods._method import build, signature_model

#: A parameter without a default.
REQUIRED: Any = object()

Parameters = dict[str, Any]
Options = list[tuple[str, Parameters]]  # our method and its parameters, the best first; all of them mean the same
Translate = Callable[[Parameters, bool, bool], Options]  # (mergekit's values, with a base?, compat?)


@dataclass(frozen=True)
class Rule:
    """One method of mergekit.

    ``each`` are its parameters per model, ``shared`` those per tensor, with their defaults; ``ignored`` have no effect on
    the result, for the reason given.  ``base`` says what the base model is: what task vectors are taken from, and is no
    expert (``vectors``; ``either``: if there is one); the first of the experts (``first``); a model as any (``member``); or
    one that, under compat, is merged even if ``models`` does not list it (``joins``).  ``counts`` turns fractions of a
    tensor's n entries into those that mergekit takes them for, under compat.
    """

    translate: Translate
    base: Literal["vectors", "either", "first", "member", "joins"] = "vectors"
    each: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    counts: Callable[[Parameters, int], Parameters] = lambda given, n: given

    def parameters(self) -> list[str]:
        """The names of all that it takes."""
        return [*self.each, *self.shared, *self.ignored]


# ── task vectors: prune, weigh, elect, add ────────────────────────────────────────────────────────────────────────────


def _family(prune: str, consensus: bool, named: str) -> Translate:
    """``named`` is our method for the paper's form; whatever differs from that is generalized task arithmetic."""

    def translate(given: Parameters, base: bool, compat: bool) -> Options:
        weights, normalize, rescale = given["weight"], given["normalize"], given.get("rescale", False)
        by_probability = prune in ("random", "rank")
        density = _one_if_equal(given["density"]) if "density" in given else 1.0
        if normalize and not consensus:
            weights = _normalized(weights, forgiving=compat)
        general = {
            "prune": prune,
            "density": density,
            "rescale": "none" if not rescale else "probability" if by_probability and not compat else "l1",
            "votes": "none" if not consensus else "weighted" if compat else "plain",
            "combine": "mean" if normalize and consensus else "sum",
            "weights": weights,
            "scale": given["lambda"],
        }
        general |= {key: _only(given, key) for key in ("epsilon", "gamma") if key in given}
        strict = not compat
        faithful = rescale == by_probability and (strict or not by_probability) and (not consensus or (normalize and strict))
        options: Options = [("generalized_task_arithmetic", general)]
        return _named(named, general, consensus) + options if faithful else options

    return translate


def _named(method: str, general: Parameters, consensus: bool) -> Options:
    """Our method by its own name, if it takes what is asked for."""
    fields = signature_model(method).model_fields
    wanted = {key: general[key] for key in ("density", "epsilon", "gamma", "scale") if key in general}
    wanted = {key: value for key, value in wanted.items() if key in fields or key != "density" or value != 1}
    weights = general["weights"]
    if "weights" in fields:
        wanted["weights"] = weights
    elif len(set(weights)) > 1 or weights[0] <= 0 or not (consensus or weights[0] == 1):
        return []
    if wanted.keys() - fields.keys() or (isinstance(wanted.get("density"), list) and not _takes_list(method, "density")):
        return []
    return [(method, wanted | ({"over": "tensor"} if "over" in fields else {}))]


@functools.cache
def _takes_list(method: str, key: str) -> bool:
    schema = signature_model(method).model_json_schema()["properties"][key]
    return any(kind.get("type") == "array" for kind in schema.get("anyOf", [schema]))


def _whole(given: Parameters, n: int) -> Parameters:
    """Densities as ⌊density · n⌋ of n entries (without a gamma at least one), and a gamma that leaves room for them."""
    shares = [*given["density"], *given.get("gamma", ())]
    if not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares):
        return given  # the method says what is wrong
    least = 0 if "gamma" in given else 1
    kept = [max(int(density * n), least if density else 0) for density in given["density"]]
    found = given | {"density": [count / n for count in kept]}
    if "gamma" in given:
        found["gamma"] = [min(int(gamma * n), n - count) / n for gamma, count in zip(given["gamma"], kept, strict=True)]
    return found


def _one_if_equal(values: Sequence[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else list(values)


def _only(given: Parameters, key: str) -> float:
    if len(set(given[key])) > 1:
        raise ParameterError(f"{key!r} must be the same for all models of a tensor, got {given[key]}")
    return given[key][0]


def _normalized(weights: Sequence[float], *, forgiving: bool) -> list[float]:
    total = sum(weights)
    if abs(total) < 1e-8:
        if forgiving:
            return list(weights)
        raise ParameterError(f"the 'weight's {list(weights)} sum to zero, so `normalize` has nothing to divide by")
    return [weight / total for weight in weights]


# ── all others ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _linear(given: Parameters, base: bool, compat: bool) -> Options:
    weights = given["weight"]
    if not given["normalize"]:
        return [("linear", {"weights": weights})]
    normalized = _normalized(weights, forgiving=False)
    return [("average", {"weights": weights}), ("linear", {"weights": normalized})]


def _nuslerp(given: Parameters, base: bool, compat: bool) -> Options:
    if len(given["weight"]) != 2:
        raise ParameterError(f"nuslerp takes exactly 2 models beside the base, got {len(given['weight'])}")
    alone = "_columns" if given["nuslerp_row_wise"] else "_rows"  # its rows are those along the first axis
    along = "" if given["nuslerp_flatten"] else alone
    return [(f"nuslerp{along}{'_delta' if base else ''}", {"weights": given["weight"]})]


def _multislerp(given: Parameters, base: bool, compat: bool) -> Options:
    if not given["normalize_weights"]:
        raise ParameterError("'normalize_weights': false leaves the sphere; it is not supported")
    return [("multislerp_delta" if base else "multislerp", {"weights": given["weight"]})]


def _rename(method: str, **names: str) -> Translate:
    return lambda given, base, compat: [(method, {names.get(key, key): value for key, value in given.items()})]


def _passthrough(given: Parameters, base: bool, compat: bool) -> Options:
    if len(given["scale"]) != 1:
        raise ParameterError(f"passthrough takes exactly 1 model, got {len(given['scale'])}")
    return [("passthrough", {"scale": given["scale"][0]})]


_MASK = {"int8_mask": "masks are never stored"}
_WEIGHED = {"weight": REQUIRED, "density": 1.0}


def _vectors(prune: str, named: str, *, consensus: bool, normalize: bool, rescale: bool, **each: float) -> Rule:
    shared = {"normalize": normalize, "lambda": 1.0, "rescale": rescale}
    rule = Rule(_family(prune, consensus, named), each=_WEIGHED | each, shared=shared, ignored=_MASK)
    return replace(rule, counts=_whole) if prune in ("magnitude", "band") else rule


RULES: dict[str, Rule] = {
    "linear": Rule(_linear, "joins", each={"weight": REQUIRED}, shared={"normalize": True}),
    "slerp": Rule(_rename("slerp"), "first", shared={"t": REQUIRED}),
    "nuslerp": Rule(_nuslerp, "either", each={"weight": REQUIRED}, shared={"nuslerp_flatten": True, "nuslerp_row_wise": False}),
    "multislerp": Rule(
        _multislerp,
        "either",
        each={"weight": REQUIRED},
        shared={"normalize_weights": True},
        ignored={"eps": "directions are computed in float64"},
    ),
    "karcher": Rule(
        _rename("karcher"), "joins", ignored=dict.fromkeys(("max_iter", "tol"), "it runs until it converges to 1e-8")
    ),
    "task_arithmetic": Rule(
        _family("none", False, "task_arithmetic"),
        each={"weight": REQUIRED},
        shared={"normalize": False, "lambda": 1.0},
        ignored=_MASK,
    ),
    "ties": _vectors("magnitude", "ties", consensus=True, normalize=True, rescale=False),
    "dare_linear": _vectors("random", "dare", consensus=False, normalize=False, rescale=True),
    "dare_ties": _vectors("random", "dare_ties", consensus=True, normalize=False, rescale=True),
    "della": _vectors("rank", "della", consensus=True, normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _vectors("rank", "della_linear", consensus=False, normalize=False, rescale=True, epsilon=0.15),
    "breadcrumbs": _vectors("band", "breadcrumbs", consensus=False, normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": _vectors("band", "breadcrumbs_ties", consensus=True, normalize=False, rescale=False, gamma=0.01),
    "sce": Rule(
        lambda given, base, compat: [
            ("sce", {"density": given["select_topk"], **({"count": "down", "balanced": "positive"} if compat else {})})
        ],
        shared={"select_topk": 1.0},
        ignored=_MASK,
    ),
    "model_stock": Rule(
        lambda given, base, compat: [("model_stock_rows" if given["filter_wise"] else "model_stock", {})],
        shared={"filter_wise": False},
    ),
    "nearswap": Rule(_rename("nearswap"), shared={"t": REQUIRED}),
    "arcee_fusion": Rule(_rename("arcee_fusion"), "first"),
    "ram": Rule(_rename("ram"), shared={"epsilon": 1e-5}),
    "ramplus_tl": Rule(_rename("ramplus_tl"), shared={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "passthrough": Rule(_passthrough, "member", each={"scale": 1.0}),
}
#: parameters that are true or false
FLAGS = {
    *("normalize", "rescale", "int8_mask", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights"),
}
#: a parameter of ours → mergekit's, for the line of an error
THEIRS = {"weights": ("weight",), "scale": ("lambda",), "density": ("density", "select_topk")}


def rule_of(method: str) -> Rule:
    """The rule of a method of mergekit, or of any other of ours, which takes its own parameters and ``weight`` per model.

    Raises UnknownNameError with the nearest name.
    """
    if method in RULES:
        return RULES[method]
    ours = registry.names("methods")
    if method not in ours:
        raise UnknownNameError(f"no merge_method is called {method!r}.{did_you_mean(method, {*RULES, *ours})}")
    signature = inspect.signature(registry.get("methods", method)).parameters
    weighted = "weights" in signature

    def translate(given: Parameters, base: bool, compat: bool) -> Options:
        found = {key: value for key, value in given.items() if key != "weight" and value is not None}
        weights = given.get("weight")
        return [(method, found | ({"weights": weights} if weights and None not in weights else {}))]

    try:
        vectors = build(method, {}).space == "delta"
    except ParameterError:  # it has no defaults; all of these work on task vectors
        vectors = True
    shared = dict.fromkeys((key for key in signature if key != "weights"), None)
    return Rule(translate, "vectors" if vectors else "member", each={"weight": None} if weighted else {}, shared=shared)
