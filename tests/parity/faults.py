"""Recipes that mergekit merges wrongly or not at all: what is said about each is in the test of that name."""

from __future__ import annotations

from tests.parity.cases import pair, recipe, weighted


def of(text: str, odd: str) -> str:
    """The recipe with an odd model for ``a``."""
    return text.replace("model: zoo/a,", f"model: zoo/{odd},")


FAULTS = {
    "sce-near": recipe("sce", names="st"),
    "linear-zero": pair("linear", base=False, weights=(0.5, -0.5)),
    "integers": of(recipe("linear", "weight: 1", names="a", base=False), "ints").replace("float32", "bfloat16"),
    "model_stock-opposite": recipe("model_stock", names="pq"),
    "model_stock-near": recipe("model_stock", names="uv"),
    "arcee_fusion-bfloat16": recipe("arcee_fusion", names="f").replace("zoo/", "half/").replace("dtype: float32\n", ""),
    "arcee_fusion-near": recipe("arcee_fusion", names="t"),
    "arcee_fusion-wide": recipe("arcee_fusion", names="f").replace("zoo/", "zoo/wide-"),
    "multislerp": weighted("multislerp", base=False),
    "multislerp-base": weighted("multislerp"),
    "nan": of(recipe("linear", "weight: 1", names="ba", base=False), "nan"),
    "odd": of(recipe("task_arithmetic", "weight: 1", names="ca"), "odd"),
    "misspelt": recipe("task_arithmetic", "wieght: 3, weight: 1", names="a") + "dtyp: bfloat16\n",
    "ties-equal": recipe("ties", "density: 0.5", weights=(1.0,), names="a").replace("zoo/", "half/"),
}
#: those that are run with a second seed
AGAIN = ("arcee_fusion-wide",)
