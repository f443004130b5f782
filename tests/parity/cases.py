"""The recipes that both run, by name: what they have in common comes first, what differs is the case."""

from __future__ import annotations

WEIGHTS = (0.4, 0.8, 0.3)


def recipe(
    method: str,
    given: str = "",
    each: str = "",
    *,
    names: str = "abc",
    weights: tuple[float, ...] | None = None,
    base: bool = True,
) -> str:
    """A recipe over the models of ``names``; ``each`` and ``weights`` are parameters per model, ``given`` of the recipe."""
    lines = [f"merge_method: {method}", *(["base_model: zoo/base"] if base else []), "models:"]
    for name, weight in zip(names, weights or (None,) * len(names), strict=False):
        own = ", ".join(part for part in (f"weight: {weight}" if weight is not None else "", each) if part)
        lines.append(f"  - {{model: zoo/{name}, parameters: {{{own}}}}}")
    return "\n".join([*lines, f"parameters: {{{given}}}", "dtype: float32", ""])


def weighted(method: str, given: str = "", each: str = "", **more) -> str:
    """A recipe with different weights."""
    return recipe(method, given, each, weights=WEIGHTS, **more)


def pair(method: str, given: str = "", **more) -> str:
    """A recipe with two models."""
    return recipe(method, given, names="ab", **more)


GRADIENT = """
merge_method: task_arithmetic
base_model: zoo/base
models:
  - model: zoo/a
    parameters: {weight: [0, 0.5, 1]}
  - model: zoo/b
    parameters:
      weight: [{filter: self_attn, value: [1, 0.2]}, {filter: mlp, value: 0.3}, {value: 0.7}]
parameters: {lambda: [{filter: down_proj, value: 0.5}, {value: 1.5}]}
dtype: float32
"""
SLICES = """
merge_method: ties
base_model: zoo/base
slices:
  - sources:
      - {model: zoo/base, layer_range: [0, 2]}
      - {model: zoo/a, layer_range: [0, 2], parameters: {weight: 1, density: [0.4, 0.6]}}
      - {model: zoo/b, layer_range: [0, 2], parameters: {weight: 0.5}}
    parameters: {density: 0.7}
  - sources:
      - {model: zoo/base, layer_range: [1, 4]}
      - {model: zoo/a, layer_range: [1, 4], parameters: {weight: [1, 0.5, 2]}}
      - {model: zoo/c, layer_range: [1, 4], parameters: {weight: 0.25}}
parameters: {density: 0.3}
dtype: float32
"""
LISTED = """
merge_method: ties
base_model: zoo/base
models: [{model: zoo/base}, {model: zoo/a}, {model: zoo/b}]
parameters: {weight: 0.5, density: 0.45}
dtype: float32
"""
CASES = {
    "linear": weighted("linear", base=False),
    "linear-sum": weighted("linear", "normalize: false", base=False),
    "linear-base-as-a-member": recipe("linear", "weight: 0.5"),
    "slerp": pair("slerp", "t: 0.3", base=True).replace("zoo/a", "zoo/base", 1),
    "slerp-gradient": pair("slerp", "t: [{filter: mlp, value: [0, 1, 0.5]}, {value: 0.4}]").replace("zoo/a", "zoo/base", 1),
    "slerp-far-apart": recipe("slerp", "t: 0.7", names="p").replace("zoo/base", "zoo/q"),
    "nuslerp": pair("nuslerp", base=False, weights=(0.4, 0.8)),
    "nuslerp-base": pair("nuslerp", weights=(0.4, 0.8)),
    "nuslerp-rows": pair("nuslerp", "nuslerp_flatten: false", base=False, weights=(0.4, 0.8)),
    "nuslerp-columns": pair("nuslerp", "nuslerp_flatten: false, nuslerp_row_wise: true", base=False, weights=(0.4, 0.8)),
    "nuslerp-base-rows": pair("nuslerp", "nuslerp_flatten: false", weights=(0.4, 0.8)),
    "nuslerp-base-columns": pair("nuslerp", "nuslerp_flatten: false, nuslerp_row_wise: true", weights=(0.4, 0.8)),
    "karcher": recipe("karcher", "max_iter: 100, tol: 1e-9", base=False),
    "karcher-base-as-a-member": recipe("karcher", "max_iter: 100, tol: 1e-9"),
    "karcher-two": pair("karcher", base=False),
    "task_arithmetic": weighted("task_arithmetic"),
    "task_arithmetic-mean": weighted("task_arithmetic", "normalize: true, lambda: 1.3"),
    "task_arithmetic-minus": recipe("task_arithmetic", "lambda: 0.7", weights=(0.5, -0.7, 0.3)),
    "task_arithmetic-cancel": recipe("task_arithmetic", "normalize: true", weights=(0.5, -0.8, 0.3)),
    "task_arithmetic-gradient": GRADIENT,
    "ties": weighted("ties", "density: 0.3"),
    "ties-each": weighted("ties", "lambda: 1.2", "density: 0.37").replace("0.37", "0.11", 1),
    "ties-sum": weighted("ties", "density: 0.7, normalize: false"),
    "ties-minus": recipe("ties", "density: 0.5", weights=(0.5, -0.7, 0.3)),
    "ties-cancel": recipe("ties", "density: 0.5", weights=(0.5, -0.5, 0.3)),
    "ties-sparse": weighted("ties", "density: 0.7", names="xyz"),
    "ties-l1": weighted("ties", "density: 0.3, rescale: true"),
    "ties-all": weighted("ties"),
    "ties-nothing": weighted("ties", "density: 0"),
    "ties-few": weighted("ties", "density: 0.004"),
    "ties-slices": SLICES,
    "ties-base-listed": LISTED,
    "dare_linear-all": weighted("dare_linear"),
    "dare_ties-all": weighted("dare_ties", "lambda: 0.8"),
    "dare_ties-all-mean": weighted("dare_ties", "normalize: true"),
    "della-all": weighted("della", "lambda: 1.1"),
    "della-all-sum": weighted("della", "normalize: false"),
    "della_linear-all": weighted("della_linear", "normalize: true"),
    "breadcrumbs": weighted("breadcrumbs", "density: 0.6, gamma: 0.05"),
    "breadcrumbs-mean": weighted("breadcrumbs", "density: 0.33, gamma: 0.04, normalize: true, lambda: 2"),
    "breadcrumbs-l1": weighted("breadcrumbs", "density: 0.6, gamma: 0.05, rescale: true"),
    "breadcrumbs_ties-l1": weighted("breadcrumbs_ties", "density: 0.6, gamma: 0.05, rescale: true"),
    "breadcrumbs-greedy": weighted("breadcrumbs", "density: 0.95, gamma: 0.1"),
    "breadcrumbs_ties": weighted("breadcrumbs_ties", "density: 0.61, gamma: 0.07"),
    "breadcrumbs_ties-mean": weighted("breadcrumbs_ties", "density: 0.61, gamma: 0.07, normalize: true"),
    "breadcrumbs-no-gamma": weighted("breadcrumbs", "density: 0.9, gamma: 0"),
    "breadcrumbs-few": weighted("breadcrumbs", "density: 0.004, gamma: 0.003"),
    "breadcrumbs_ties-few": weighted("breadcrumbs_ties", "density: 0.004"),
    "sce-few": recipe("sce", "select_topk: 0.004"),
    "sce-none": recipe("sce", "select_topk: 0"),
    "sce": recipe("sce"),
    "sce-some": recipe("sce", "select_topk: 0.3"),
    "sce-some-two": pair("sce", "select_topk: 0.77"),
    "sce-some-sparse": recipe("sce", "select_topk: 0.3", names="xyz"),
    "model_stock": recipe("model_stock"),
    "model_stock-two": pair("model_stock"),
    "model_stock-rows": recipe("model_stock", "filter_wise: true"),
    "nearswap": recipe("nearswap", "t: 0.01", names="a"),
    "nearswap-gradient": recipe("nearswap", "t: [0.001, 0.03]", names="a"),
    "arcee_fusion": recipe("arcee_fusion", names="f"),
    "ram": recipe("ram", names="xyz"),
    "ram-epsilon": recipe("ram", "epsilon: 0.005", names="xyz"),
    "ramplus_tl": recipe("ramplus_tl", names="xyz"),
    "ramplus_tl-all": recipe("ramplus_tl", "epsilon: 0.005, r: 0.5, alpha: 3", names="xyz"),
    "passthrough": recipe("passthrough", names="a", base=False),
    "passthrough-scale": recipe(
        "passthrough", "scale: [{filter: o_proj, value: [0.5, 2]}, {value: 0.9}]", names="a", base=False
    ),
}
#: random entries are dropped, by two sources of random numbers: one expert, of which the laws are compared
SAMPLED = {
    "dare_linear-some": recipe("dare_linear", "density: 0.3", weights=(1.0,), names="a"),
    "dare_linear-plain": recipe("dare_linear", "density: 0.3, rescale: false", weights=(1.0,), names="a"),
    "dare_ties-some": recipe("dare_ties", "density: 0.7", weights=(1.0,), names="a"),
    "della-some": recipe("della", "density: 0.4, epsilon: 0.2", weights=(1.0,), names="a"),
    "della_linear-some": recipe("della_linear", "density: 0.6, epsilon: 0.3", weights=(1.0,), names="a"),
    "della_linear-plain": recipe("della_linear", "density: 0.6, epsilon: 0.3, rescale: false", weights=(1.0,), names="a"),
}


def halved(text: str) -> str:
    """The recipe over models stored in bfloat16, computed in float32 and stored in bfloat16."""
    return text.replace("zoo/", "half/") + "out_dtype: bfloat16\n"


def bfloat16(text: str) -> str:
    """The recipe over models stored in bfloat16, with ``dtype: bfloat16``: mergekit then also computes in it."""
    return text.replace("zoo/", "half/").replace("dtype: float32", "dtype: bfloat16")


def ranks(name: str) -> bool:
    """Whether a case keeps the first of a ranking: between models stored in bfloat16 many tie there, see the faults."""
    whole = ("ties-all", "ties-nothing", "sce", "sce-none")
    return name.startswith(("ties", "breadcrumbs", "sce")) and name not in whole
