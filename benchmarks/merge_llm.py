"""Merge Llama-shaped checkpoints: wall time and memory against the disk's floor and, if it is installed, against mergekit.

    python benchmarks/merge_llm.py --params 1.1b --methods task_arithmetic,ties [--peer PATH/mergekit-yaml] [--runs 5]

Makes a base and three fine-tunes from a seed (once, in --work), then runs every program as a whole process, in turn, and
prints medians and ratios.  The floor is reading all input bytes once and writing the output's bytes once, in one thread with
reused buffers, with the page cache in the state that the runs before it left.  For the spectral methods there is a second
floor: their decompositions and products alone, on random matrices of the same shapes, one a processor.

``1.1b-small`` has the bytes of ``1.1b`` in 20,000 tensors, ``1.1b-4`` its layers four times and not 22 times.
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
import zlib
from pathlib import Path

SHAPES = {  # hidden, layers, mlp, heads, key-value heads, vocabulary
    "30m": (512, 8, 1376, 8, 4, 8192),
    "1.1b": (2048, 22, 5632, 32, 4, 32000),
    "1.1b-4": (2048, 4, 5632, 32, 4, 4000),
    "1.1b-small": (1, 0, 0, 1, 1, 1),
    "3b": (3072, 26, 8192, 24, 8, 64000),
    "7b": (4096, 32, 11008, 32, 32, 32000),
}
#: method → our parameters, and mergekit's name and parameters where it has the method
METHODS: dict[str, tuple[dict, str | None, dict]] = {
    "average": ({}, "linear", {"weight": 1.0}),
    "task_arithmetic": ({"scale": 0.3}, "task_arithmetic", {"weight": 0.3}),
    "ties": ({"density": 0.2, "over": "tensor"}, "ties", {"weight": 1.0, "density": 0.2}),
    "dare_ties": ({"density": 0.5}, "dare_ties", {"weight": 1.0, "density": 0.5}),
    "della": ({"density": 0.5, "epsilon": 0.1}, "della", {"weight": 1.0, "density": 0.5, "epsilon": 0.1}),
    "breadcrumbs": ({}, "breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 0.01}),
    "sce": ({"density": 0.2}, "sce", {"select_topk": 0.2}),
    "karcher": ({}, "karcher", {}),
    "iso_c": ({}, None, {}),
    "tsv_m": ({}, None, {}),
    "wudi": ({}, None, {}),
}

SPECTRAL = ("iso_c", "tsv_m", "wudi")


def layout(size: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama of that size."""
    hidden, layers, mlp, heads, kv, vocabulary = SHAPES[size]
    if size == "1.1b-small":
        return {f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.weight": (250, 220) for i in range(20_000)}
    key = hidden // heads * kv
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (hidden if n == "q" else key, hidden) for n in "qkv"}
        shapes |= {f"{at}.self_attn.o_proj.weight": (hidden, hidden), f"{at}.mlp.down_proj.weight": (hidden, mlp)}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (mlp, hidden) for n in ("gate", "up")}
        shapes |= {f"{at}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_inputs(size: str, folder: Path) -> None:
    """Write base, ft0, ft1 and ft2 in bfloat16, in shards; what is there already is kept."""
    import torch

    from eutectic.checkpoint.base import Checkpoint
    from eutectic.checkpoint.publish import published
    from eutectic.checkpoint.save import CHUNK, save_tensors
    from eutectic.checkpoint.spec import TensorSpec

    class Synthetic(Checkpoint):
        """Seeded by tensor name and position, so that sharding and order do not matter."""

        def __init__(self, expert: str) -> None:
            self._expert = expert
            self._specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in layout(size).items()}

        @property
        def specs(self) -> dict[str, TensorSpec]:
            return self._specs

        def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
            def noise(who: str) -> torch.Tensor:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{who} {name} {start // CHUNK}".encode()))
                return torch.randn(stop - start, generator=generator)

            weights = noise("base") * 0.02
            return (weights if self._expert == "base" else weights + noise(self._expert) * 0.001).bfloat16()

    hidden, layers, mlp, heads, kv, vocabulary = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
    }
    for expert in ("base", "ft0", "ft1", "ft2"):
        if not (folder / expert).exists():
            print(f"making {folder / expert}", flush=True)
            with published(folder / expert) as partial:
                save_tensors(Synthetic(expert), partial, max_shard_bytes=1_000_000_000)
                (partial / "config.json").write_text(json.dumps(config))


def floor(inputs: list[Path], out: Path) -> float:
    """Seconds to read every weights file once and write as many bytes as one of them has."""
    buffer = bytearray(16 << 20)
    view = memoryview(buffer)
    started = time.perf_counter()
    size = 0
    for folder in inputs:
        size = 0
        for path in sorted(folder.glob("*.safetensors")):
            size += path.stat().st_size
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    with out.open("wb", buffering=0) as file:
        while size > 0:
            size -= file.write(view[: min(size, len(view))])
    taken = time.perf_counter() - started
    out.unlink()
    return taken


def spectral_floor(method: str, size: str, k: int = 3) -> float:
    """Seconds that the decompositions and products of a method take alone, spread over the processors."""
    import torch

    torch.set_num_threads(1)
    shapes = [s for name, s in layout(size).items() if len(s) == 2 and "embed" not in name and "head" not in name]
    total = 0.0
    for m, n in set(shapes):
        x = torch.randn(min(m, n), max(m, n), dtype=torch.float64)
        square = torch.randn(min(m, n), min(m, n), dtype=torch.float64)
        rows, r = torch.randn(m, n, dtype=torch.float64), min(k * m, n)
        stacked = torch.randn(*sorted((k * m, n)), dtype=torch.float64)
        directions = torch.randn(n, r, dtype=torch.float64)

        def decompose(x: torch.Tensor = x, part: int = len(x)) -> None:
            torch.linalg.eigh(x @ x.T)[1][:, :part].T @ x

        calls = {
            # the sum's spectrum, and the factors put together
            "iso_c": [(1, decompose), (1, lambda x=x, square=square: square @ x)],
            # the experts' strongest directions; two polar factors; the factors put together
            "tsv_m": [
                (k, lambda x=x: decompose(x, len(x) // k)),
                (1, decompose),
                (1, lambda square=square: decompose(square, len(square))),
                (1, lambda x=x, square=square: square @ x),
                (1, lambda square=square: square @ square),
                (1, lambda x=x, square=square: square @ x),
            ],
            # the spectrum of all experts' rows; three products with its directions for each expert, one for their sum, and back
            "wudi": [
                (1, lambda stacked=stacked: decompose(stacked, len(stacked))),
                (3 * k + 2, lambda rows=rows, V=directions: rows @ V),
            ],
        }[method]
        for times, call in calls:
            call()
            started = time.perf_counter()
            call()
            total += times * (time.perf_counter() - started) * shapes.count((m, n))
    return total / len(os.sched_getaffinity(0))


def measured(command: list[str]) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak resident bytes of a whole process, and what its last line of JSON says."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    found = {
        "whole_s": time.perf_counter() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "rss_mb": usage.ru_maxrss / 1024,
    }
    lines = output.strip().splitlines()
    return found | (json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {})


def child(recipe: str, out: str, memory: str = "") -> None:
    """Merge in this process and print the seconds from recipe to published folder."""
    from eutectic.merge import recipe as recipes
    from eutectic.merge import run
    from eutectic.merge.plan import bytes_of

    started = time.perf_counter()
    parsed = recipes.load(Path(recipe))
    limit = bytes_of(memory) if memory else None
    run.save(run.merged_from(parsed, Path(recipe).parent), out, recipe=parsed, memory_bytes=limit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"inner_s": time.perf_counter() - started, "inner_rss_mb": peak}))


def main() -> None:
    """Run the comparison and print one row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", choices=SHAPES, default="1.1b")
    parser.add_argument("--methods", default="average,task_arithmetic,ties")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", help="path of an installed mergekit-yaml")
    parser.add_argument("--peer-runs", type=int, help="as many as --runs if left out")
    parser.add_argument("--memory", default="", help="what our process may take, like 1GiB")
    parser.add_argument("--work", type=Path, default=Path("runs/merge_llm"))
    arguments = parser.parse_args()
    models = arguments.work / arguments.params
    models.mkdir(parents=True, exist_ok=True)
    make_inputs(arguments.params, models)
    scratch = arguments.work / "out"
    print("method            runs  floor_s  inner_s  /floor  whole_s  rss_MB  peer_s  peer_MB  peer/ours  /spectral floor")
    for method in arguments.methods.split(","):
        ours, peer_name, theirs = METHODS[method]
        names = ["ft0", "ft1", "ft2"]
        needs_base = method not in ("average", "karcher")
        recipe = {"method": method, "experts": {n: n for n in names}, "parameters": ours}
        path = models / f"{method}.json"  # JSON is YAML
        path.write_text(json.dumps(recipe | ({"base": "base"} if needs_base else {})))
        inputs = [models / n for n in (["base"] if needs_base else []) + names]
        rows, floors, peers = [], [], []
        peer_runs = arguments.runs if arguments.peer_runs is None else arguments.peer_runs
        for turn in range(arguments.runs):
            floors.append(floor(inputs, arguments.work / "floor.bin"))
            shutil.rmtree(scratch, ignore_errors=True)
            rows.append(measured([sys.executable, __file__, "--child", str(path), str(scratch), arguments.memory]))
            shutil.rmtree(scratch, ignore_errors=True)
            if arguments.peer and peer_name and turn < peer_runs:
                peers.append(
                    measured([arguments.peer, str(peer_recipe(models, peer_name, theirs, needs_base)), str(scratch), "--quiet"])
                )
        spectral = f"{spectral_floor(method, arguments.params):10.1f} s" if method in SPECTRAL else ""
        print(row(method, rows, floors, peers), spectral, flush=True)
    shutil.rmtree(scratch, ignore_errors=True)


def peer_recipe(models: Path, name: str, parameters: dict, needs_base: bool) -> Path:
    """The same merge in mergekit's schema."""
    found = {
        "merge_method": name,
        "models": [{"model": str((models / n).absolute()), "parameters": parameters} for n in ("ft0", "ft1", "ft2")],
        "dtype": "bfloat16",
    }
    if needs_base:
        found["base_model"] = str((models / "base").absolute())
    path = models / f"peer-{name}.yml"
    path.write_text(json.dumps(found))
    return path


def row(method: str, rows: list[dict], floors: list[float], peers: list[dict]) -> str:
    """Medians, and the ratios of this run."""

    def median(key: str, among: list[dict]) -> float:
        return statistics.median(r[key] for r in among) if among else float("nan")

    base = statistics.median(floors)
    ratio = statistics.median(p["whole_s"] / r["whole_s"] for p, r in zip(peers, rows, strict=False)) if peers else float("nan")
    return (
        f"{method:16} {len(rows):5} {base:8.2f} {median('inner_s', rows):8.2f} {median('inner_s', rows) / base:7.2f} "
        f"{median('whole_s', rows):8.2f} {median('rss_mb', rows):7.0f} {median('whole_s', peers):7.1f} "
        f"{median('rss_mb', peers):8.0f} {ratio:10.1f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
