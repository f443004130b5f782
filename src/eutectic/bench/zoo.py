"""The zoo: which suites there are, where they lie, and how they are made.

Every expert is really trained, by ``eutectic.tuning``, from one base under frozen few-shot heads.  A build resumes: what
is published in its folder is not made again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from eutectic import record
from eutectic.bench import sources
from eutectic.bench.heads import few_shot, prototype_head
from eutectic.bench.suite import Suite
from eutectic.bench.vit import resized_positions
from eutectic.checkpoint.base import Checkpoint, Memory, live
from eutectic.checkpoint.folder import copy_side_files, from_hub, open_folder
from eutectic.checkpoint.publish import published, whole
from eutectic.checkpoint.save import save_file, save_tensors
from eutectic.checkpoint.views import Cast, Select
from eutectic.checkpoint.writer import explained
from eutectic.errors import MissingDependencyError, TaskError, UnknownNameError, did_you_mean
from eutectic.merge.run import Progress, silent
from eutectic.tuning.lora import save_adapter
from eutectic.tuning.trainer import Training, fine_tune


@dataclasses.dataclass(frozen=True)
class SuiteSpec:
    """How a suite is made; ``suite.json`` keeps it beside the result.

    ``source`` is the hub id of the base, of which ``blocks`` are kept (all if 0).  Images are ``side`` pixels square, texts
    ``tokens`` long.  Heads are made of ``shots`` images a class and multiplied by ``head_scale``.  ``sizes`` are the most
    samples of each split, ``keep`` names the classes of a task when not all are used.
    """

    name: str
    kind: Literal["vision", "text"]
    source: str
    tasks: tuple[str, ...]
    training: Training
    sizes: Mapping[str, int]
    blocks: int = 0
    side: int = 0
    tokens: int = 0
    pooling: Literal["cls", "mean"] = "cls"
    shots: int = 10
    head_scale: float = 20.0
    dtype: Literal["float32", "float16"] = "float32"
    keep: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    note: str = ""


DINO_NOTE = (
    "built from a local folder other than facebook/dinov2-small, the numbers are of that network "
    "(a public copy is DINOv2-S, saliency-adapted: its features are weaker than the original's)"
)
MINI = SuiteSpec(
    name="mini",
    kind="vision",
    source="facebook/dinov2-small",
    tasks=("mnist", "fashion", "animals", "letters", "scripts", "indian_pines", "digits8", "openclipart"),
    training=Training(steps=600, lr=3e-4, rank=8, alpha=16, shift=2, kind="lora"),
    sizes={"train": 2500, "val": 64, "adapt": 192, "test": 400},
    blocks=5,
    side=42,
    pooling="mean",
    dtype="float16",
    # scripts whose letters look alike, and the vaguer of a clip-art library's folders, are left out
    keep={
        "scripts": ("Armenian", "Hebrew", "Arabic", "Devanagari", "Thai", "Georgian", "Ethiopic"),
        "openclipart": ("animals", "food", "people", "plants", "signs_and_symbols", "transportation"),
    },
    note="base: the first blocks of DINOv2-S, saliency-adapted; experts: low-rank fine-tunes of every linear layer",
)
DINO = SuiteSpec(
    name="dino",
    kind="vision",
    source="facebook/dinov2-small",
    tasks=("mnist", "fashion", "cifar10", "animals", "letters", "elpv", "indian_pines", "digits8"),
    training=Training(steps=400, lr=5e-5, shift=3),
    sizes={"train": 8000, "val": 64, "adapt": 256, "test": 500},
    side=56,
    note=DINO_NOTE,
)
TEXT = SuiteSpec(
    name="text",
    kind="text",
    source="sentence-transformers/all-MiniLM-L6-v2",
    tasks=("bbc", "movie", "amazon", "tweets", "spam", "wordnet", "brown", "debian"),
    training=Training(steps=100, lr=5e-5),
    sizes={"train": 8000, "val": 64, "adapt": 256, "test": 500},
    tokens=64,
    pooling="mean",
)
SPECS = {spec.name: spec for spec in (MINI, DINO, TEXT)}


def packaged() -> Path:
    """The suite `mini` inside the package."""
    return Path(__file__).parent / "data" / "mini"


def cache() -> Path:
    """Where suites are built: ``$EUTECTIC_CACHE``, else ``eutectic`` in the user's cache folder."""
    chosen = os.environ.get("EUTECTIC_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "eutectic"


def find(name: str) -> Path:
    """The folder of a suite: a path to one, or a name (`mini` is in the package, others in the cache)."""
    if name == "mini":
        return packaged()
    if name in SPECS:
        return cache() / "zoo" / name
    if (Path(name) / "suite.json").exists():
        return Path(name)
    raise UnknownNameError(f"no suite is called {name!r}, and no folder of that name holds one.{did_you_mean(name, SPECS)}")


def open_suite(name: str) -> Suite:
    """A finished suite by name or folder.  Raises UnknownNameError, or TaskError saying how to build or finish it."""
    folder = find(name)
    if not (folder / "suite.json").exists():
        raise TaskError(f"the suite {name!r} is not built yet: run `eutectic zoo build {name}` (it would lie in {folder})")
    suite = Suite(folder)
    missing = [task for task in suite.classes if not (folder / "experts" / task).exists()]
    if missing:
        raise TaskError(f"{folder}: the build stopped before {', '.join(missing)}; the same `eutectic zoo build` carries on")
    return suite


def spec_of(name: str) -> SuiteSpec:
    """How a named suite is made.  Raises UnknownNameError."""
    if name not in SPECS:
        raise UnknownNameError(f"no suite is called {name!r}.{did_you_mean(name, SPECS)}")
    return SPECS[name]


def build(spec: SuiteSpec, out: Path, data: Path | None = None, base: Path | None = None, progress: Progress = silent) -> Suite:
    """Make what is missing of a suite in ``out``: base, data, heads, experts.

    Without ``data`` and ``base``, `mini` is remade from the data and base inside the package; other suites need a data
    folder, and take their base from the hub.  Deterministic on one machine with one thread count.
    Raises TaskError if ``out`` was begun with other settings, or no data folder was named.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(spec)))  # as they read back
    if data is not None and not data.is_dir():
        raise TaskError(f"{data}: no such folder of data sets")
    if base is not None and not (base / "config.json").is_file():
        raise TaskError(f"{base}: no Hugging Face folder (it lacks config.json); name one with --base")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    if (out / "suite.json").exists() and complete(Suite(out).info["settings"]) != settings:
        raise TaskError(f"{out} was begun with other settings; remove it, or build into another folder")
    if not (out / "base").exists():
        _make_base(spec, out / "base", base)
    if not (out / "data.npz").exists() or not (out / "suite.json").exists():
        classes = _make_data(spec, out, data)
        info = {"name": spec.name, "side": spec.side, "tasks": classes, "settings": settings, "versions": record.versions()}
        with whole(out / "suite.json") as partial:
            partial.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    suite = Suite(out)
    if not (out / "heads.safetensors").exists():
        _make_heads(spec, suite)
    steps = spec.training.steps
    for position, task in enumerate(spec.tasks):
        if not (out / "experts" / task).exists():
            _make_expert(
                spec, suite, task, lambda step, loss, t=task, p=position: progress(t, p * steps + step, len(spec.tasks) * steps)
            )
    return suite


def complete(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a suite that was built before there were several kinds of adapters, as they would be written now."""
    match settings:
        case {"training": {"rank": int(rank)} as training}:
            return {**settings, "training": {"kind": "lora" if rank else "full", "rslora": False} | training}
    return settings


def own_training(suite: Suite) -> Training:
    """How the suite's own experts were made."""
    return Training(**complete(suite.info["settings"])["training"])


def _make_base(spec: SuiteSpec, target: Path, source: Path | None) -> None:
    own = packaged() / "base"
    if source is None:
        source = own if spec.name == "mini" and own.exists() else from_hub(spec.source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    opened = open_folder(source)
    # integer buffers of older transformers (position_ids) are in the file, but no longer in the network
    weights: Checkpoint = Select(opened, lambda name: opened.spec(name).dtype.is_floating_point)
    if spec.blocks:
        config |= {"num_hidden_layers": spec.blocks, "image_size": spec.side}
        weights = _shortened(weights, spec.blocks, spec.side // config["patch_size"])
    with published(target) as folder:
        copy_side_files(source, folder)
        (folder / "config.json").write_text(json.dumps(config | {"dtype": spec.dtype}, indent=1) + "\n")
        save_tensors(Cast(weights, getattr(torch, spec.dtype)), folder)


def _shortened(weights: Checkpoint, blocks: int, grid: int) -> Checkpoint:
    """The first blocks of a ViT, its position embeddings resized to a square grid: a network of its own."""
    kept = {}
    for name in weights.specs:
        parts = name.split(".")
        if parts[:2] != ["encoder", "layer"] or int(parts[2]) < blocks:
            kept[name] = weights.read(name)
    positions = "embeddings.position_embeddings"
    kept[positions] = resized_positions(kept[positions].float(), grid, grid)
    return Memory(kept, origin=weights.origin)


def _make_data(spec: SuiteSpec, out: Path, data: Path | None) -> dict[str, list[str]]:
    """Write ``data.npz``; returns task → class names."""
    if data is None:
        if spec.name != "mini":
            raise TaskError(f"the suite {spec.name!r} is made from a data folder: name it with --data")
        shutil.copyfile(packaged() / "data.npz", out / "data.npz")
        classes = Suite(packaged()).classes
        return {task: classes[task] for task in spec.tasks}
    # converted first, so that splits are disjoint as the network sees them
    convert = _tokenizer(out / "base", spec.tokens) if spec.kind == "text" else functools.partial(_fitted, side=spec.side)
    stored: dict[str, np.ndarray] = {}
    classes = {}
    for task in spec.tasks:
        raw = sources.load_raw(data, task)
        if task in spec.keep:
            raw = sources.keep_classes(raw, spec.keep[task])
        classes[task] = raw.classes
        (train, train_labels), (test, test_labels) = raw.train, raw.test
        raw = sources.Raw((convert(train), train_labels), (convert(test), test_labels), raw.classes)
        for split, (inputs, labels) in sources.split(raw, spec.sizes, spec.training.seed).items():
            stored[f"{task}.{split}.inputs"] = inputs
            stored[f"{task}.{split}.labels"] = labels.astype(np.int16)
    with whole(out / "data.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **stored)
    return classes


def _fitted(images: np.ndarray, side: int) -> np.ndarray:
    """Images larger than the network sees are stored at its size; smaller ones as they are."""
    if images.shape[1] <= side:
        return images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _tokenizer(folder: Path, tokens: int) -> Callable[[np.ndarray], np.ndarray]:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError("text suites need transformers: pip install 'eutectic[text]'") from None
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(texts: np.ndarray) -> np.ndarray:
        encoded = tokenizer(list(texts), truncation=True, max_length=tokens, padding="max_length")
        return np.array(encoded["input_ids"], np.int32)

    return tokenize


def _make_heads(spec: SuiteSpec, suite: Suite) -> None:
    backbone = suite.backbone()
    tensors: dict[str, Tensor] = {}
    for task, classes in suite.classes.items():
        train = suite.arrays(task, "train")
        index = few_shot(train.labels, spec.shots, torch.Generator().manual_seed(spec.training.seed))
        inputs, labels = train.take(index)
        with torch.no_grad():
            head = prototype_head(backbone(inputs), labels, len(classes), spec.head_scale)
        tensors |= {f"{task}.{part}": tensor for part, tensor in head.state_dict().items()}
    save_file(Memory(tensors), suite.folder / "heads.safetensors")


def _make_expert(spec: SuiteSpec, suite: Suite, task: str, progress: Callable[[int, float], None]) -> None:
    backbone = suite.backbone()
    fine_tune(backbone, suite.task(task).head, suite.arrays(task, "train"), spec.training, progress)
    (suite.folder / "experts").mkdir(exist_ok=True)
    with published(suite.folder / "experts" / task) as folder:
        save_expert(backbone, suite, spec.training.rank, folder)


def save_expert(backbone: nn.Module, suite: Suite, rank: int, folder: Path) -> None:
    """Write a fine-tune into an existing folder two below the suite's: its adapters if it has a ``rank``, else all of it."""
    if rank:
        save_adapter(backbone, folder, "../../base", getattr(torch, suite.info["settings"]["dtype"]))
    else:
        copy_side_files(suite.folder / "base", folder)
        save_tensors(live(backbone), folder)
