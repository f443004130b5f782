"""The forward pass of a mixture against the dense network's, and how SMILE is made, against FusionBench's own modules.

    python benchmarks/mixture_forward.py [--threads 1,2] [--peer PATH/python] [--construct]

A CLIP vision tower of ViT-B/32 with random weights and eight random experts, a batch of random images, routing per sample or
token.  Dense network and mixture take turns in one process, and what is printed is the median of their ratios.  The FLOP floor
is what cannot be left out: the dense network's own, and for each sample the merging of its matrices (2 N for each of their
numbers), or for each token the gate's and one expert's products.  ``x floor`` is the ratio of times over the ratio of FLOPs.
``held`` is the memory of all parameters and buffers over the base's.

``--peer`` is the Python of an environment with fusion-bench 0.2.33, torch 2.13.0 and transformers 4.57.6; its modules take the
place of the same layers of the same network, WEMoE with its routing per sample (``batch_reduce=False``).  ``--construct`` makes
SMILE (gate_rank 16, rank 32) of eight experts in files and saves it, as whole processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learn_step
from learn_step import SHAPES, measured, peak_mb, spread, tower

EXPERTS, GATE, RANK, DENSITY = 8, 16, 32, 0.1
METHODS = ("wemoe", "e_wemoe", "smile")


def turns(dense: Callable[[], Any], mixture: Callable[[], Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of both, alternately, after one of each."""
    found: dict[str, list[float]] = {"dense_s": [], "mixture_s": []}
    for number in range(repeats + 1):
        for key, run in (("dense_s", dense), ("mixture_s", mixture)):
            started = time.perf_counter()
            run()
            if number:
                found[key].append(time.perf_counter() - started)
    return found


def mixed(size: str, method: str) -> Any:
    """The tower with routed layers of random experts."""
    import torch

    from eutectic.checkpoint.base import Memory
    from eutectic.fusion import _mixing
    from eutectic.fusion._fusion import ModelSet
    from eutectic.fusion._products import packed
    from eutectic.fusion._routing import linears, named, routed

    network = tower(size).eval()
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    experts = dict.fromkeys(map(str, range(EXPERTS)), Memory({}))
    known = linears(network)
    if method == "smile":
        layers: dict[str, Any] = {}
        for name, linear in known.items():
            m, n = linear.weight.shape
            layers[name] = {"kind": "low_rank", "experts": EXPERTS, "directions": RANK, "rank": RANK, "gate": GATE, "top": 1}
            tensors[named(name, "right")] = torch.randn(EXPERTS, RANK, n, generator=random) / n**0.5
            tensors[named(name, "left")] = 0.01 * torch.randn(m, EXPERTS, RANK, generator=random)
            tensors[named(name, "shift")] = torch.zeros(EXPERTS, m)
        return routed(network, layers, Memory(tensors))
    kind, shared = ("dense", None) if method == "wemoe" else ("sparse", "all blocks")
    models = ModelSet(network, Memory({}), experts)
    layers = dict(_mixing.plan(models, _mixing.MLP, 2, {"kind": kind}, shared))
    for name in layers:
        m, n = known[name].weight.shape
        deltas = 0.001 * torch.randn(EXPERTS, m, n, generator=random)
        tensors[named(name, "shift")] = torch.zeros(EXPERTS, m)
        if method == "wemoe":
            tensors[named(name, "deltas")] = deltas
        else:
            tensors[named(name, "gaps")], tensors[named(name, "values")], counts = packed(deltas, DENSITY)
            layers[name] = {**layers[name], "counts": list(counts)}
    tensors |= _mixing.routers_begun(models, layers, 0.3, 0)
    return routed(network, layers, Memory(tensors))


def flops(size: str, method: str, batch: int) -> float:
    """The FLOP floor over the dense network's FLOPs."""
    hidden, mlp, layers, _, image, patch = SHAPES[size]
    tokens = (image // patch) ** 2 + 1
    matrices = layers * (4 * hidden**2 + 2 * hidden * mlp)
    attention = layers * 2 * tokens * hidden
    dense = 2 * batch * tokens * (matrices + attention) + 2 * batch * (tokens - 1) * 3 * patch**2 * hidden
    if method == "smile":
        # every expert's gate, and one expert's directions and their images
        inputs, outputs = layers * (5 * hidden + mlp), layers * (5 * hidden + mlp)
        more = 2 * batch * tokens * (EXPERTS * GATE * inputs + (RANK - GATE) * inputs + RANK * outputs)
    else:
        density = 1 if method == "wemoe" else DENSITY
        router = layers * tokens * (hidden**2 + hidden * EXPERTS)
        more = 2 * batch * (density * EXPERTS * layers * 2 * hidden * mlp + router)
    return 1 + more / dense


def child(size: str, method: str, batch: int, repeats: int, threads: int) -> None:
    """Our forward passes in this process."""
    import torch

    torch.set_num_threads(threads)
    dense, mixture = tower(size).eval(), mixed(size, method)

    def nbytes(network: Any) -> int:
        return sum(
            t.numel() * t.element_size() for t in {id(t): t for t in network.state_dict(keep_vars=True).values()}.values()
        )

    side = SHAPES[size][4]
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = turns(lambda: dense(images), lambda: mixture(images), repeats)
    print(json.dumps(found | {"held": nbytes(mixture) / nbytes(dense), "peak_mb": peak_mb()}))


def peer_child(size: str, method: str, batch: int, repeats: int, threads: int) -> None:
    """FusionBench's forward passes in this process."""
    import torch
    from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    torch.set_num_threads(threads)
    dense, mixture = tower(size).eval(), tower(size).eval()

    def near(module: Any) -> Any:
        found = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter += 0.001 * torch.randn_like(parameter)
        return found

    if method == "smile":
        for name, module in list(mixture.named_modules()):
            if type(module) is torch.nn.Linear:
                parent, _, leaf = name.rpartition(".")
                experts = [near(module) for _ in range(EXPERTS)]
                made = SmileMoELinear(module, experts, gate_k=GATE, k=RANK, top_k=1, full_matrices=False)
                setattr(mixture.get_submodule(parent), leaf, made)
    else:
        for layer in mixture.vision_model.vision_model.encoder.layers:
            experts = [near(layer.mlp) for _ in range(EXPERTS)]
            layer.mlp = WeightEnsemblingMoE(SHAPES[size][0], layer.mlp, experts, init_lambda=0.3, batch_first=True)
    side = SHAPES[size][4]
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = turns(lambda: dense(images), lambda: mixture(images), repeats)
    print(json.dumps(found | {"peak_mb": peak_mb()}))


def construct(size: str, folder: Path, threads: int) -> None:
    """Make SMILE of the experts in ``folder`` and save it, in this process."""
    import torch

    from eutectic.checkpoint.folder import open_folder
    from eutectic.fusion import _api
    from eutectic.fusion._folder import save
    from eutectic.fusion._fusion import ModelSet, Run

    torch.set_num_threads(threads)
    tower(size)  # imports half of transformers, which is no part of either's work
    started = time.perf_counter()
    base, *experts = (open_folder(folder / name) for name in ("base", *(f"e{k}" for k in range(EXPERTS))))
    named = {f"e{k}": expert for k, expert in enumerate(experts)}
    with torch.device("meta"):
        network = tower(size)
    artefact = _api.fit("smile", ModelSet(network, base, named), [], {"rank": RANK, "gate_rank": GATE}, Run())
    save(_api.fused(base, named, artefact), folder / "smile", replace=True)
    nbytes = (folder / "smile" / "model.safetensors").stat().st_size
    print(json.dumps({"s": time.perf_counter() - started, "peak_mb": peak_mb(), "mb": nbytes / 2**20}))


def peer_construct(size: str, folder: Path, threads: int) -> None:
    """The same by FusionBench, without saving."""
    import torch
    from fusion_bench.method.smile_upscaling.smile_upscaling import SmileUpscalingAlgorithm
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    tower(size)
    started = time.perf_counter()
    models = [tower(size) for _ in range(EXPERTS + 1)]
    for model, name in zip(models, ("base", *(f"e{k}" for k in range(EXPERTS))), strict=True):
        model.load_state_dict(load_file(folder / name / "model.safetensors"), strict=False)
    method = SmileUpscalingAlgorithm(device="cpu", full_matrices=False, gate_k=GATE, k=RANK, top_k=1)
    method.merge(models[0], models[1:])
    print(json.dumps({"s": time.perf_counter() - started, "peak_mb": peak_mb(), "mb": 0}))


def main() -> None:
    """Print one row a method, batch and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="b32")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--batches", default="32,1")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--peer", help="Python of an environment with fusion-bench")
    parser.add_argument("--construct", action="store_true", help="make SMILE instead")
    parser.add_argument("--work", type=Path, default=Path("runs/learn_step"), help="where learn_step.py keeps its experts")
    arguments = parser.parse_args()
    threads = [int(number) for number in arguments.threads.split(",")]
    peer = arguments.peer
    if arguments.construct:
        folder = (arguments.work / arguments.size).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        learn_step.make_inputs(arguments.size, EXPERTS, folder)
        for number in threads:
            ours = measured(sys.executable, "--construct-child", [arguments.size, folder, number], number, __file__)
            line = f"smile constructed, {number}: {ours['s']:.1f} s, {ours['peak_mb']:.0f} MB, a folder of {ours['mb']:.0f} MiB"
            if peer:
                theirs = measured(peer, "--peer-construct", [arguments.size, folder, number], number, __file__)
                line += f"; peer {theirs['s']:.1f} s, {theirs['peak_mb']:.0f} MB: {theirs['s'] / ours['s']:.1f} times our time"
                line += f", {theirs['peak_mb'] / ours['peak_mb']:.1f} times our memory"
            print(line, flush=True)
        return
    heading = f"{'method, batch, threads':24} {'dense_s':24} {'mixture/dense':22}"
    print(f"{heading} {'floor':>6} {'x floor':>7} {'held':>5} {'peer/dense':>10}")
    for method in arguments.methods.split(","):
        for batch in map(int, arguments.batches.split(",")):
            for number in threads:
                settings = [arguments.size, method, batch, arguments.repeats, number]
                ours = measured(sys.executable, "--child", settings, number, __file__)
                ratios = [b / a for a, b in zip(ours["dense_s"], ours["mixture_s"], strict=True)]
                floor = flops(arguments.size, method, batch)
                line = f"{f'{method}, {batch}, {number}':24} {spread(ours['dense_s']):24} {spread(ratios):22} {floor:6.2f}"
                line += f" {statistics.median(ratios) / floor:7.2f} {ours['held']:5.2f}"
                if peer and method != "e_wemoe":
                    theirs = measured(peer, "--peer-child", settings, number, __file__)
                    against = statistics.median(b / a for a, b in zip(theirs["dense_s"], theirs["mixture_s"], strict=True))
                    line += f" {against:10.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--child", size, method, batch, repeats, threads]:
            child(size, method, int(batch), int(repeats), int(threads))
        case ["--peer-child", size, method, batch, repeats, threads]:
            peer_child(size, method, int(batch), int(repeats), int(threads))
        case ["--construct-child", size, folder, threads]:
            construct(size, Path(folder), int(threads))
        case ["--peer-construct", size, folder, threads]:
            peer_construct(size, Path(folder), int(threads))
        case _:
            main()
