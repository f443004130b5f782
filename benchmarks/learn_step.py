"""A step of AdaMerging and of Concrete, against the plain passes that it cannot do without and against FusionBench.

    python benchmarks/learn_step.py [--methods adamerging] [--threads 1,2] [--peer PATH/python] [--steps 4]

Makes a CLIP vision tower of ViT-B/32 with random weights and eight experts from a seed (once, in --work), and fits each method
for a few steps in a process of its own.  A step is timed from one report of progress to the next: batches, mask, θ, forward
and backward passes, gradients, Adam.  Between two steps the same process runs the plain passes: the same network forward and
backward on as many batches, gradients added up; twice for Concrete AdaMerging, whose inner step has passes of its own.  The
first step of each process is a warm-up.  Peak memory is the process's VmHWM, with imports.  Task vectors are
where the default has them, in the experts' files, or, with ``memory`` after a method, in memory.  With ``adapters`` after a
method the experts are LoRA adapters of rank 16 of every matrix, in memory.

``--peer`` is the Python of an environment with fusion-bench 0.2.33, torch 2.13.0 and transformers 4.57.6.  Its own classes run
on the same weights, from their own loop; only what would need the network is replaced: images and text embeddings.  Their data
are limited to ``--peer-memory``, so that a step that needs more is an error and not the end of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, mlp, layers, heads, image, patch
    "b32": (768, 3072, 12, 12, 224, 32),
    "tiny": (64, 128, 2, 2, 64, 32),
}
BATCH, CLASSES, PROJECTION, RANK = 16, 50, 512, 16
#: method → our parameters, and the passes over every task that a step takes
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "adamerging": ({}, 1),
    "concrete_task_arithmetic": ({"parameters": {"scale": 0.3}}, 1),
    "concrete_adamerging": ({}, 2),
}
VARIANTS = ["adamerging", "adamerging memory", "concrete_task_arithmetic", "concrete_adamerging"]


def config(size: str) -> dict[str, Any]:
    """The ``config.json`` of the tower."""
    hidden, mlp, layers, heads, image, patch = SHAPES[size]
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        "projection_dim": PROJECTION,
    }


def tower(size: str) -> Any:
    """The network, whose outputs are features ``[B, hidden]``; its names are those of published checkpoints."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_model = CLIPVisionModel(CLIPVisionConfig(**config(size)))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.vision_model(pixel_values=images).pooler_output

    return Tower()


def make_inputs(size: str, experts: int, folder: Path) -> None:
    """Write base, e0, e1 … in float32; what is there already is kept."""
    import torch

    from eutectic.checkpoint.base import Memory
    from eutectic.checkpoint.publish import published
    from eutectic.checkpoint.save import save_tensors

    torch.manual_seed(0)
    weights = {name: tensor.detach() for name, tensor in tower(size).named_parameters()}
    for at, name in enumerate(["base", *(f"e{k}" for k in range(experts))]):
        if not (folder / name).exists():
            print(f"making {folder / name}", flush=True)
            noise = torch.Generator().manual_seed(at)
            changed = {
                key: tensor + 0.001 * torch.randn(tensor.shape, generator=noise) if at else tensor
                for key, tensor in weights.items()
            }
            with published(folder / name) as partial:
                save_tensors(Memory(changed), partial)
                (partial / "config.json").write_text(json.dumps(config(size)))


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def peak_mb() -> float:
    """The most resident memory that this process has had."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def images_of(size: str, task: int, n: int) -> Any:
    """Random images ``[n, 3, S, S]`` of a task, uint8."""
    import torch

    side = SHAPES[size][4]
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(task))


def head_of(size: str, task: int) -> tuple[Any, Any]:
    """A projection ``[P, hidden]``, the same for all tasks, and text embeddings ``[C, P]`` of length 1."""
    import torch

    projection = torch.randn(PROJECTION, SHAPES[size][0], generator=torch.Generator().manual_seed(0)) / SHAPES[size][0] ** 0.5
    text = torch.randn(CLASSES, PROJECTION, generator=torch.Generator().manual_seed(task + 1))
    return projection, torch.nn.functional.normalize(text, dim=1)


def adapter_of(base: Any, number: int) -> Any:
    """A LoRA adapter of every matrix, with random factors."""
    import torch

    from eutectic.checkpoint.base import Memory
    from eutectic.checkpoint.lora import Lora
    from eutectic.checkpoint.peft import PREFIX, Adapter

    noise, tensors = torch.Generator().manual_seed(number), {}
    for name, spec in base.specs.items():
        if len(spec.shape) == 2 and name.endswith(".weight"):
            module, (m, n) = PREFIX + name.removesuffix(".weight"), spec.shape
            tensors[f"{module}.lora_A.weight"] = 0.01 * torch.randn(RANK, n, generator=noise)
            tensors[f"{module}.lora_B.weight"] = 0.01 * torch.randn(m, RANK, generator=noise)
    return Lora(base, Adapter(Memory(tensors), {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))


class Enough(Exception):
    """As many steps as were asked for are measured."""


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def child(size: str, variant: str, experts: int, steps: int, threads: int, folder: Path) -> None:
    """Fit in this process and print the seconds of every step and of the plain passes after it."""
    import torch
    from torch.nn import functional as F

    from eutectic.checkpoint.safetensors import SafetensorsFile
    from eutectic.fusion._api import fit
    from eutectic.fusion._fusion import ModelSet, Run
    from eutectic.task import Arrays, Task

    torch.set_num_threads(threads)
    method, *how = variant.split()
    run = Run(autocast="autocast" in how, storage="memory" if "memory" in how else None)
    parameters, passes = METHODS[method]
    network = tower(size).eval()

    def task(number: int) -> Task:
        projection, text = head_of(size, number)
        arrays = Arrays(
            images_of(size, number, 2 * BATCH),
            torch.zeros(2 * BATCH, dtype=torch.long),
            lambda images: images.float().div_(127.5).sub_(1),
        )
        return Task(f"e{number}", lambda x: 100 * F.normalize(x @ projection.T, dim=1) @ text.T, adapt=arrays)

    tasks = [task(number) for number in range(experts)]
    found: dict[str, list[float]] = {"step_s": [], "step_cpu_s": [], "plain_s": [], "plain_cpu_s": []}
    since = clocks()

    def plain() -> None:
        for number, one in enumerate(tasks * passes):
            if number % experts == 0:
                network.zero_grad(set_to_none=False)
            inputs, _ = one.arrays("adapt").take(torch.arange(BATCH))
            with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
                features = network(inputs)
            log_p = F.log_softmax(one.head(features.float()), dim=1)
            (-(log_p.exp() * log_p).sum(1).mean()).backward()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal since
        for kind in ("step", "plain"):
            if kind == "plain":
                plain()
            now = clocks()
            for key, before, after in zip((f"{kind}_s", f"{kind}_cpu_s"), since, now, strict=True):
                found[key].append(after - before)
            since = now
        if done > steps:
            raise Enough

    base, *others = (SafetensorsFile(folder / name / "model.safetensors") for name in ["base", *(t.name for t in tasks)])
    if "adapters" in how:
        others = [adapter_of(base, number) for number in range(experts)]
    models = ModelSet(network, base, dict(zip([t.name for t in tasks], others, strict=True)))
    with contextlib.suppress(Enough):
        fit(method, models, tasks, parameters | {"batch_size": BATCH}, dataclasses.replace(run, progress=progress))
    print(json.dumps({key: times[1:] for key, times in found.items()} | {"peak_mb": peak_mb()}))


# ── FusionBench ───────────────────────────────────────────────────────────────────────────────────────────────────────


def peer_child(size: str, method: str, experts: int, steps: int, threads: int, folder: Path, limit_gb: float) -> None:
    """Run FusionBench's class in this process and print the seconds of every step, or at what it ran out of memory."""
    import torch
    from fusion_bench.method.adamerging.clip_layer_wise_adamerging import CLIPLayerWiseAdaMergingAlgorithm
    from fusion_bench.method.concrete_subspace import (
        ConcreteLayerWiseAdaMergingForCLIP,
        ConcreteTaskArithmeticAlgorithmForCLIP,
    )
    from fusion_bench.modelpool import CLIPVisionModelPool
    from omegaconf import OmegaConf

    torch.set_num_threads(threads)
    passes = METHODS[method][1]
    starts: list[float] = []

    def batches(task: int) -> Iterator[tuple[Any, Any]]:
        while True:
            if task == 0:
                starts.append(time.perf_counter())
                if len(starts) > passes * (steps + 1):
                    raise Enough
            yield images_of(size, task, BATCH).float().div_(127.5).sub_(1), torch.zeros(BATCH, dtype=torch.long)

    streams = {f"e{task}": batches(task) for task in range(experts)}

    class Offline:
        """What would come from the hub, a head and images, and no logger."""

        def log_hyperparams(self, *settings: Any, **more: Any) -> None:
            pass

        def setup_zero_shot_classification_head(self) -> None:
            projection, _ = head_of(size, 0)
            self.visual_projection = torch.nn.Linear(*reversed(projection.shape), bias=False).requires_grad_(False)
            self.visual_projection.weight.copy_(projection)
            self.logit_scale_exp = torch.tensor(100.0)
            self.zeroshot_weights = {name: head_of(size, task)[1] for task, name in enumerate(streams)}

        def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Any, Any]]:
            return streams[task]

    algorithm = {
        "adamerging": CLIPLayerWiseAdaMergingAlgorithm,
        "concrete_task_arithmetic": ConcreteTaskArithmeticAlgorithmForCLIP,
        "concrete_adamerging": ConcreteLayerWiseAdaMergingForCLIP,
    }[method]
    # as its own configuration files have them
    common = {"optimizer": "adam", "lr": 1e-3, "clamp_weights": False, "tie_weights": True, "strict": False}
    settings = common | {"max_steps": steps + 2, "save_interval": 500, "initial_logits": 0, "temperature": 0.5}
    settings |= {"weights": None, "init_values": 0.3, "base_lr": 1, "adamerging_lr": 1e-3, "scaling_factor": 0.3}
    settings |= {"mask_checkpoint": None, "skip_training": False, "merge_dtype": None, "save_merging_weights": False}
    paths = {"_pretrained_": str(folder / "base")} | {name: str(folder / name) for name in streams}
    offline = type("Measured", (Offline, algorithm), {})(OmegaConf.create(settings))
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 1e9), resource.RLIM_INFINITY))
    failed = ""
    try:
        offline.run(CLIPVisionModelPool(models=OmegaConf.create(paths)))
    except Enough:
        pass
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        failed = "out of memory"
    times = [b - a for a, b in zip(starts[::passes], starts[passes::passes], strict=False)]
    print(json.dumps({"step_s": times[1:], "peak_mb": peak_mb(), "failed": failed}))


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(python: str, kind: str, arguments: list[object], threads: int, script: str = __file__) -> dict[str, Any]:
    """What a child says in its last line."""
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, script, kind, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}:\n{process.stderr[-2000:]}")
    return json.loads(lines[-1])


def spread(times: list[float]) -> str:
    """Median and extremes."""
    return f"{statistics.median(times):7.2f} [{min(times):.2f}, {max(times):.2f}]" if times else f"{'—':>7}"


def row(what: str, ours: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """One line of the table."""
    wall, cpu = ([a / b for a, b in zip(ours[f"step{s}"], ours[f"plain{s}"], strict=True)] for s in ("_s", "_cpu_s"))
    line = f"{what:33} {spread(ours['step_s']):24} {spread(ours['plain_s']):24} {spread(wall):20} {spread(cpu):20}"
    line += f" {ours['peak_mb']:7.0f}"
    if peer is None:
        return line
    if peer["failed"]:
        return f"{line}  {peer['failed']} at {peer['peak_mb']:.0f} MB: {peer['peak_mb'] / ours['peak_mb']:.1f} times our peak"
    ratio = statistics.median(ours["step_s"]) / statistics.median(peer["step_s"])
    return f"{line}  {spread(peer['step_s']):22} {peer['peak_mb']:7.0f} {ratio:9.2f} {ours['peak_mb'] / peer['peak_mb']:11.2f}"


def main() -> None:
    """Run the comparison and print one row a method and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="b32")
    parser.add_argument("--methods", default=",".join(VARIANTS))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="after the warm-up")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--peer", help="Python of an environment with fusion-bench")
    parser.add_argument("--peer-memory", type=float, default=20, help="GB of data that it may have")
    parser.add_argument("--work", type=Path, default=Path("runs/learn_step"))
    arguments = parser.parse_args()
    folder = (arguments.work / arguments.size).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, __file__, "--make", arguments.size, str(arguments.experts), str(folder)], check=True)
    flags = Path("/proc/cpuinfo").read_text().split()
    fast = sorted({"amx_bf16", "avx512_bf16"}.intersection(flags))
    print(f"bfloat16 instructions: {', '.join(fast) or 'none, so autocast is not measured'}")
    print(
        f"{'method, threads':33} {'step_s':24} {'plain_s':24} {'step/plain':20} {'the same in CPU s':20} {'peak_MB':7}  "
        f"{'peer_s':22} peer_MB ours/peer ours/peer_MB"
    )
    variants = arguments.methods.split(",")
    before: dict[tuple[str, int], dict[str, Any]] = {}
    for variant in variants + [f"{variant} autocast" for variant in variants if fast]:
        for threads in map(int, arguments.threads.split(",")):
            settings = [arguments.size, variant, arguments.experts, arguments.steps, threads, folder]
            ours = measured(sys.executable, "--child", settings, threads)
            peer = None
            if arguments.peer and variant in METHODS:
                peer = measured(arguments.peer, "--peer-child", [*settings, arguments.peer_memory], threads)
            print(row(f"{variant}, {threads}", ours, peer), flush=True)
            before[variant, threads] = ours
            if variant not in variants:
                in_float32 = before[variant.removesuffix(" autocast"), threads]
                wall, cpu = (statistics.median(in_float32[s]) / statistics.median(ours[s]) for s in ("step_s", "step_cpu_s"))
                print(
                    f"  a step in bfloat16 is {wall:.2f} times as fast as in float32, in CPU seconds {cpu:.2f} times",
                    flush=True,
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--make", size, experts, folder]:
            make_inputs(size, int(experts), Path(folder))
        case ["--child", size, method, experts, steps, threads, folder]:
            child(size, method, int(experts), int(steps), int(threads), Path(folder))
        case ["--peer-child", size, method, experts, steps, threads, folder, limit]:
            peer_child(size, method, int(experts), int(steps), int(threads), Path(folder), float(limit))
        case _:
            main()
