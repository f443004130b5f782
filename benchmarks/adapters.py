"""Fuse LoRA adapters by TIES: wall time and memory in core space and, if it is installed somewhere, of PEFT's ``ties_svd``.

    python benchmarks/adapters.py --size 1.1b --layers 2 [--peer PYTHON] [--runs 3]

Makes rank-16 adapters of every linear layer of a Llama from a seed (once, in --work), in float32 as PEFT saves them.  Ours is
timed from opening the folders to the written folder, PEFT's is ``add_weighted_adapter`` alone, with all adapters loaded: it
forms every change, merges them densely, and takes the SVD to rank 16.  Every run is a process of its own, in turn.  Memory is
the peak above what the process held before, and its ratio to the adapters' bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {"small": (512, 1376, 64), "1.1b": (2048, 5632, 256)}  # hidden, mlp, key-value


def targets(size: str, layers: int) -> dict[str, tuple[int, int]]:
    """Module → outputs and inputs, of a Llama."""
    hidden, mlp, kv = SHAPES[size]
    shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    shapes |= {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def make(folder: Path, size: str, layers: int, seed: int, rank: int) -> None:
    """Write an adapter, if it is not there."""
    import torch

    from eutectic.checkpoint.base import Memory
    from eutectic.checkpoint.peft import PREFIX, config_of
    from eutectic.checkpoint.publish import published
    from eutectic.merge.adapter_folder import write_adapter

    if folder.exists():
        return
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inputs) in targets(size, layers).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) / inputs**0.5
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, rank, generator=random) * 0.01
    with published(folder) as partial:
        write_adapter(
            Memory(tensors), config_of(dict.fromkeys((f"{n}.weight" for n in targets(size, layers)), rank), {}), partial
        )


def resident() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ours(folders: list[Path], out: Path, args: argparse.Namespace) -> dict[str, float]:
    """Merge in core space, from folders to a folder."""
    import eutectic
    from eutectic.merge import adapters as _  # noqa: F401 — imported before the clock runs

    before, started = resident(), time.perf_counter()
    fused = eutectic.merge_adapters("ties", folders, density=0.5, over="tensor", space=args.space, rank=args.out_rank)
    eutectic.save(fused, out)
    return report(before, started) | {"error": fused.error}


def peft(folders: list[Path], out: Path, args: argparse.Namespace) -> dict[str, float]:
    """Merge densely, in memory."""
    import torch
    from peft import PeftModel
    from torch import nn

    model = nn.Module()
    for name, (rows, columns) in targets(args.size, args.layers).items():
        parent = model
        for part in name.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
    names = [folder.name.replace(".", "_") for folder in folders]  # PEFT makes modules of them
    loaded = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        loaded.load_adapter(folder, name)
    before, started = resident(), time.perf_counter()
    loaded.add_weighted_adapter(
        names, [1.0] * len(names), "merged", combination_type="ties_svd", density=0.5, svd_full_matrices=not args.thin_svd
    )
    return report(before, started)


def report(before: int, started: float) -> dict[str, float]:
    """Seconds since the start, and the peak in bytes above what was there."""
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def main() -> None:
    """Run every program in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out-rank", type=int, help="of our result; all that it takes by default")
    parser.add_argument("--space", default="core")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--peer", help="a Python that has PEFT")
    parser.add_argument("--thin-svd", action="store_true", help="PEFT with svd_full_matrices=False, which is not its default")
    parser.add_argument("--work", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--side", choices=["ours", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    label = f"{args.size}-{args.layers}-r{args.rank}"
    folders = [args.work / f"{label}-{i}" for i in range(args.adapters)]
    out = args.work / "out"
    if args.side is not None:
        print(json.dumps({"ours": ours, "peft": peft}[args.side](folders, out, args)))
        return
    for seed, folder in enumerate(folders):
        make(folder, args.size, args.layers, seed, args.rank)
    nbytes = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
    print(f"{args.adapters} adapters of rank {args.rank}, {label}: {nbytes / 2**20:.1f} MiB")
    found: dict[str, list[dict[str, float]]] = {"ours": [], **({"peft": []} if args.peer else {})}
    for _ in range(args.runs):
        for side, runs in found.items():
            shutil.rmtree(out, ignore_errors=True)
            python = args.peer if side == "peft" else sys.executable
            command = [python, "-W", "ignore", __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    for side, runs in found.items():
        peak = statistics.median(run["peak"] for run in runs)
        more = f", error {runs[0]['error']:.3f}" if side == "ours" else ""
        print(f"{side:5} {middle[side]:8.2f} s   peak {peak / 2**20:7.1f} MiB, {peak / nbytes:.2f} x the adapters{more}")
    if args.peer:
        print(f"ratio {middle['peft'] / middle['ours']:8.1f} x")


if __name__ == "__main__":
    main()
