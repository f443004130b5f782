"""Fuse the eight adapters of the suite mini in every space, at the methods' defaults, and score the results on its tasks.

    python benchmarks/adapter_spaces.py [--methods ties tsv_m]

``dense`` merges the whole models; the others merge the adapters to an adapter, of rank 8 where that is said.
"""

from __future__ import annotations

import argparse

import eutectic
from eutectic import record
from eutectic.bench.evaluate import evaluate
from eutectic.bench.zoo import open_suite
from eutectic.checkpoint.base import Checkpoint
from eutectic.checkpoint.lora import Lora
from eutectic.checkpoint.peft import Adapter, config_of
from eutectic.merge.adapters import Fused


def over(base: Checkpoint, fused: Fused) -> Lora:
    """A fused adapter applied to its base, without a folder in between."""
    ranks = {name: fused.rank_of(name) for name in fused.targets}
    held = eutectic.open(eutectic.state_dict(fused))
    return Lora(base, Adapter(held, config_of(ranks, {})))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "tsv_m"])
    args = parser.parse_args()
    suite = open_suite("mini")
    folders = {task: suite.folder / "experts" / task for task in suite.classes}
    print("| method | space | rank | left out | mean accuracy |\n|---|---|---:|---:|---:|")
    for method in args.methods:
        dense = eutectic.merge(method, suite.base, suite.experts())
        models: list[tuple[str, Checkpoint, str, str]] = [("dense", dense, "", "")]
        for space, rank in (("core", None), ("core", 8), ("knots", None), ("knots", 8)):
            fused = eutectic.merge_adapters(method, folders, space=space, rank=rank)
            model = over(suite.base, fused)
            most = max(fused.rank_of(name) for name in fused.targets)
            models.append((space, model, str(most), f"{100 * fused.error:.0f} %"))
        for space, model, most, lost in models:
            mean = record.mean_of(list(evaluate(suite.backbone(model), suite.tasks)))
            print(f"| {method} | {space} | {most} | {lost} | {100 * mean.value:.1f} |", flush=True)


if __name__ == "__main__":
    main()
