"""Average two trained adapters exactly, and factor by factor: how far the results are apart, and what they score.

    python benchmarks/factor_wise.py [--tasks mnist fashion]

The adapters are two experts of the suite mini.  Exact is (s₁B₁A₁ + s₂B₂A₂) / 2.  Factor by factor is
s (B₁ + B₂)/2 · (A₁ + A₂)/2, which has the products of one adapter's B and the other's A in it; and with −B₂ and −A₂, which are
the same adapter, or with both adapters split anew into B and A by their SVD, it is something else.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from eutectic.bench.evaluate import evaluate
from eutectic.bench.zoo import open_suite
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.peft import open_adapter
from eutectic.methods._cores import thinned


def main() -> None:
    """Print norms, then scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs=2, default=["mnist", "fashion"])
    args = parser.parse_args()
    suite = open_suite("mini")
    first, second = (open_adapter(suite.folder / "experts" / task) for task in args.tasks)
    changes: dict[str, dict[str, Tensor]] = {"exact": {}, "factor-wise": {}, "with −B₂, −A₂": {}, "split by SVD": {}}
    alike: list[float] = []
    for name in first.targets:
        (B1, A1), (B2, A2) = ((adapter.left(name).double(), adapter.right(name).double()) for adapter in (first, second))
        changes["exact"][name] = (B1 @ A1 + B2 @ A2) / 2
        changes["factor-wise"][name] = (B1 + B2) @ (A1 + A2) / 4
        changes["with −B₂, −A₂"][name] = (B1 - B2) @ (A1 - A2) / 4
        (l1, r1, *_), (l2, r2, *_) = (thinned(x, len(A1)) for x in (B1 @ A1, B2 @ A2))
        changes["split by SVD"][name] = (l1 + l2) @ (r1 + r2) / 4
        alike.append(float(torch.nn.functional.cosine_similarity(A1.flatten(), A2.flatten(), dim=0)))
    print(f"cosine of A₁ and A₂: {sum(alike) / len(alike):.2f}")
    whole = math.fsum(float(change.square().sum()) for change in changes["exact"].values())
    for label, of in changes.items():
        off = math.fsum(float((change - changes["exact"][name]).square().sum()) for name, change in of.items())
        print(f"{label:14} ‖ΔW − exact‖ / ‖exact‖ = {math.sqrt(off / whole):.3f}")

    def over_base(of: dict[str, Tensor]) -> Checkpoint:
        base = {name: suite.base.read(name) for name in suite.base.specs}
        return Memory(base | {name: (base[name].double() + change).to(base[name].dtype) for name, change in of.items()})

    own = [task for task in suite.tasks if task.name in args.tasks]
    for label, of in ({"base": {}} | changes).items():
        scores = evaluate(suite.backbone(over_base(of)), own)
        print(f"{label:14} {'  '.join(f'{score.task} {100 * score.value:.1f}' for score in scores)}", flush=True)


if __name__ == "__main__":
    main()
