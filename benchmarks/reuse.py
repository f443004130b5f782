"""Reuse networks that cannot be merged, on Fashion-MNIST: ensembles, density reuse, HMR, RKME, and one model of all data.

    python benchmarks/reuse.py --data DATA/fashion.npz --work WORK [--seed 0] [--split A …] [--only train]

Four published splits of the training images among two to seven parties (Tang et al., IJCAI 2023, after Wu et al., ICML
2019), of which 5,000 are kept aside: 1,000 labelled for calibration, and all without labels for distillation.  Parties are
trained once in --work, as the folders that they would hand over; what is scored is opened from those folders.  No choice
looks at the test set. Records go to benchmarks/results/reuse.jsonl; those that it has already are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eutectic import record
from eutectic.ensemble import _hmr, _rkme
from eutectic.ensemble._density import Cosines
from eutectic.ensemble._ensemble import Ensemble, Examples, Outputs
from eutectic.ensemble._gaussians import Gaussians
from eutectic.ensemble._networks import CNN, Classifier, Normalisation
from eutectic.ensemble._party import About, Party, learn_density, open_party, write_party
from eutectic.record import Record
from eutectic.task import Arrays
from eutectic.tuning.distil import distil
from eutectic.tuning.trainer import Training, fine_tune

RESULTS = Path(__file__).parent / "results" / "reuse.jsonl"
#: split → parties → class → which slice of the class's images, as fractions.  The second party of B has the slices that were
#: presumably meant (the published file lists six for five classes).
SPLITS: dict[str, list[dict[int, tuple[float, float]]]] = {
    "A": [
        {c: (0, f) for c, f in zip(range(8), (1, 1, 0.8, 0.6, 0.5, 0.5, 0.4, 0.2), strict=True)},
        {c: (1 - f, 1) for c, f in zip(range(2, 10), (0.2, 0.4, 0.5, 0.5, 0.6, 0.8, 1, 1), strict=True)},
    ],
    "B": [
        {0: (0, 1), 1: (0, 1), 2: (0, 0.8), 3: (0, 0.5), 4: (0, 0.2)},
        {2: (0.8, 1), 3: (0.5, 1), 4: (0.2, 1), 5: (0, 0.8), 6: (0, 0.5)},
        {5: (0.8, 1), 6: (0.5, 1), 7: (0, 1), 8: (0, 1), 9: (0, 1)},
    ],
    "C": [dict.fromkeys(classes, (0, 1)) for classes in ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9))],
    "D": [
        {0: (0, 1), 1: (0, 0.6), 2: (0, 0.2)},
        {1: (0.6, 1), 2: (0.2, 0.8), 3: (0, 0.4)},
        {2: (0.8, 1), 3: (0.4, 1), 4: (0, 0.6), 5: (0, 0.2)},
        {4: (0.6, 1), 5: (0.2, 0.8), 6: (0, 0.4)},
        {5: (0.8, 1), 6: (0.4, 1), 7: (0, 0.6), 8: (0, 0.2)},
        {7: (0.6, 1), 8: (0.2, 0.8), 9: (0, 0.4)},
        {8: (0.8, 1), 9: (0.4, 1)},
    ],
    "all": [dict.fromkeys(range(10), (0, 1))],
}
PUBLISHED = {"A": 0.913, "B": 0.884, "C": 0.846, "D": 0.848}  # without exchange, read off the paper's plots
#: parties take turns: their networks cannot be merged
NETWORKS = (CNN(channels=(16, 32), hidden=128), CNN(channels=(16, 32, 64), hidden=64))
SPACE, DENSITY = Cosines(size=10), Gaussians(components=16, floor=0.1, shrink=20)
PIXELS = Normalisation(mean=(0.286,), std=(0.353,))
ASIDE, LABELLED, EPOCHS, BATCH, LR = 5000, 1000, 6, 128, 4e-3
ONLY = "train: parties, and measure nothing; quick: what trains nothing but parties; calibrated: that, calibrations and HMR"
SIZES = {"weighted_ensemble": (20, 100, 1000), "density_reuse_tempered": (20, 100, 1000)}
SIZES |= {"density_reuse_joint": (100, 1000), "density_reuse_mpce": (100, 1000)}


@dataclasses.dataclass(frozen=True)
class Data:
    """Images ``[N, 1, 28, 28]`` in 0 … 1 and labels: what the parties share out, what is aside, and the test set."""

    train: Arrays
    aside: Arrays
    test: Arrays
    classes: list[str]


def load(path: Path, seed: int) -> Data:
    """Read; the seed decides what is aside, and the order within a class."""
    with np.load(path, allow_pickle=False) as data:
        parts = [(torch.from_numpy(data[f"{s}_images"]), torch.from_numpy(data[f"{s}_labels"])) for s in ("train", "test")]
        classes = [str(name) for name in data["classes"]]
    (x, y), (x_test, y_test) = [(images.permute(0, 3, 1, 2) / 255, labels) for images, labels in parts]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    aside, rest = order[:ASIDE], order[ASIDE:]
    return Data(Arrays(x[rest], y[rest]), Arrays(x[aside], y[aside]), Arrays(x_test, y_test), classes)


def views(images: Tensor) -> Tensor:
    """Images ``[N, 1, 28, 28]``, their mirror images, and each moved by one pixel in one of four ways: ``[6 N, 1, 28, 28]``."""
    wide = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    moved = [wide[..., down : down + 28, right : right + 28] for down, right in ((2, 1), (0, 1), (1, 2), (1, 0))]
    return torch.cat([images, images.flip(-1), moved[0], moved[1].flip(-1), moved[2].flip(-1), moved[3]])


def share(data: Data, party: dict[int, tuple[float, float]]) -> Arrays:
    """What a party has, its labels as places among its own classes."""
    chosen, labels = [], []
    for place, (label, (start, stop)) in enumerate(party.items()):
        of_class = (data.train.labels == label).nonzero().flatten()
        own = of_class[round(start * len(of_class)) : round(stop * len(of_class))]
        chosen.append(own)
        labels.append(torch.full_like(own, place))
    return Arrays(data.train.inputs[torch.cat(chosen)], torch.cat(labels))


def training(n: int, seed: int, epochs: float = EPOCHS) -> Training:
    """The same number of epochs for everyone."""
    return Training(steps=max(1, round(epochs * n / BATCH)), lr=LR, batch_size=BATCH, seed=seed)


def train(data: Data, split: str, number: int, seed: int, folder: Path) -> None:
    """What a party does by itself; nothing leaves it but the folder."""
    party, own = SPLITS[split][number], share(data, SPLITS[split][number])
    about = About(
        classes=tuple(data.classes[c] for c in party),
        counts=tuple(own.labels.bincount().tolist()),
        shape=(1, 28, 28),
        classifier=NETWORKS[number % len(NETWORKS)],
        normalisation=PIXELS,
        space=SPACE,
        density=DENSITY,
    )
    torch.manual_seed(1000 * seed + number)
    network = about.network().to(memory_format=torch.channels_last)
    fine_tune(network, nn.Identity(), own, training(len(own), seed))
    write_party(Party(about, network, learn_density(about, own.inputs, own.labels, seed)), folder)


class Run:
    """One split with one seed: its parties, and records of what is measured that are not there yet."""

    def __init__(self, data: Data, split: str, seed: int, folder: Path, done: set[tuple]) -> None:
        """Open the parties' folders."""
        self.data, self.split, self.seed, self.done = data, split, seed, done
        self.folders = {f"P{i + 1}": folder / f"{i}" for i in range(len(SPLITS[split]))}
        self.union = Ensemble("mean_ensemble", self.parties()).union
        self.place = torch.tensor([self.union.classes.index(name) for name in data.classes])
        self.labels = self.place[data.test.labels]
        self.shared = Examples(data.aside.inputs[:LABELLED], self.place[data.aside.labels[:LABELLED]])

    def parties(self) -> dict[str, Party]:
        """Fresh from their folders, for calibration changes them."""
        return {name: open_party(folder) for name, folder in self.folders.items()}

    def measure(self, method: str, size: int, predict: Callable[[], Tensor], **parameters: object) -> Iterator[Record]:
        """A record of the accuracy of ``predict()``, log-scores ``[N, C]`` on the test set."""
        if (method, self.split, self.seed, size) in self.done:
            return
        started = time.perf_counter()
        hits = int((predict().argmax(1) == self.labels).sum())
        low, high = record.wilson(hits, len(self.labels))
        yield Record(
            suite="reuse",
            method=method,
            task=self.split,
            metric="accuracy",
            value=hits / len(self.labels),
            low=low,
            high=high,
            n=len(self.labels),
            seed=self.seed,
            wall_s=time.perf_counter() - started,
            peak_rss_bytes=record.peak_rss_bytes(),
            versions=record.versions(record.ENGINE),
            parameters={"examples": size, **parameters},
        )

    def all(self, only: str | None) -> Iterator[Record]:
        """Everything, cheapest first; or only what trains nothing (``quick``), or no student (``calibrated``)."""
        test = self.data.test.inputs
        reuse = Ensemble("density_reuse", self.parties())
        outputs = reuse.outputs_of(test)
        for name, log_p in zip(self.folders, outputs.log_p_KBC, strict=True):
            yield from self.measure(f"individual {name}", 0, lambda log_p=log_p: log_p)
        if self.split == "all":
            return
        for method in ("mean_ensemble", "max_ensemble", "density_reuse"):
            rule = Ensemble(method, reuse.parties).rule
            yield from self.measure(method, 0, lambda rule=rule: rule.combine(outputs, {}))
        shared = reuse.outputs_of(self.shared.inputs)
        for method in ("weighted_ensemble", "density_reuse_tempered"):
            for size in SIZES[method]:
                yield from self.measure(method, size, lambda m=method, n=size: self._quick(m, shared, outputs, n))
        yield from self.measure("rkme", 0, lambda: self._rkme(outputs))
        if only == "quick":
            return
        for method in ("density_reuse_joint", "density_reuse_mpce"):
            for size in SIZES[method]:
                yield from self.measure(method, size, lambda m=method, n=size: self._trained(m, n))
        yield from self._hmr()
        if only == "calibrated":
            return
        unlabelled = self.data.aside.inputs
        yield from self.measure("student", 0, lambda: self._student(reuse, unlabelled), unlabelled=ASIDE)
        yield from self.measure(
            "student of draws", 0, lambda: self._student(reuse, reuse.draw(20_000, self.seed)), drawn=20_000
        )

    def _quick(self, method: str, shared: Outputs, outputs: Outputs, size: int) -> Tensor:
        """Rules that change no party's model need its outputs once."""
        ensemble = _Known(method, self.parties(), Outputs(shared.log_p_KBC[:, :size], shared.log_weights_KB[:, :size]))
        ensemble.fit(Examples(self.shared.inputs[:size], self.shared.labels[:size]))
        return ensemble.rule.combine(outputs, ensemble.fitted)

    def _trained(self, method: str, size: int) -> Tensor:
        ensemble = Ensemble(method, self.parties())
        ensemble.fit(Examples(self.shared.inputs[:size], self.shared.labels[:size]), self.seed)
        return ensemble.rule.combine(ensemble.outputs_of(self.data.test.inputs), ensemble.fitted)

    def _rkme(self, outputs: Outputs) -> Tensor:
        embeddings = []
        for party in SPLITS[self.split]:
            embeddings.append(_rkme.embed(SPACE.into(share(self.data, party).inputs), points=10, seed=self.seed))
        chosen = _rkme.route(embeddings, SPACE.into(self.data.test.inputs))
        return outputs.log_p_KBC[chosen, torch.arange(len(chosen))]

    def _student(self, reuse: Ensemble, inputs: Tensor) -> Tensor:
        network = NETWORKS[0].build((1, 28, 28), len(self.union.classes)).to(memory_format=torch.channels_last)
        normalised = Classifier(network, PIXELS, (1, 28, 28))
        shown = views(inputs)
        distil(reuse, normalised, shown, training(len(shown), self.seed, 60 * ASIDE / len(shown)), mixed=True)
        with torch.no_grad():
            return torch.cat([normalised(batch) for batch in self.data.test.inputs.split(512)])

    def _hmr(self) -> Iterator[Record]:
        """Rounds of exchanges, to 100 and 300 examples in all."""
        if all(("hmr", self.split, self.seed, size) in self.done for size in (100, 300)):
            return
        shares = [share(self.data, party) for party in SPLITS[self.split]]

        def train(classifier: nn.Module, own: Arrays) -> None:
            steps = max(20, len(own) // BATCH)
            fine_tune(classifier, nn.Identity(), own, Training(steps, 1e-3, BATCH, seed=self.seed))

        exchange = _hmr.Exchange(list(self.parties().values()), self.union, shares, self.seed, train)
        for size, more in ((100, 100), (300, 200)):
            exchange.round(more)
            yield from self.measure("hmr", size, lambda: exchange.predict(self.data.test.inputs))


def plot(path: Path) -> None:
    """Draw accuracy against the number of shared labelled examples, a panel for each split, as an SVG; needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for one in record.load(RESULTS):
        sizes = found.setdefault(one.task, {}).setdefault(one.method, {})
        sizes.setdefault(one.parameters["examples"], []).append(100 * one.value)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "reuse", "font.size": 8}):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        for axes, split in zip(figure.subplots(1, 4), PUBLISHED, strict=True):
            lines = found.get(split, {})
            for method in (*SIZES, "hmr"):
                start = lines.get("max_ensemble" if method == "hmr" else "density_reuse", {})
                if method != "weighted_ensemble" and method in lines:
                    points = sorted({**start, **lines[method]}.items())
                    axes.plot(
                        [10 if n == 0 else n for n, _ in points],
                        [float(np.mean(v)) for _, v in points],
                        "o-",
                        ms=3,
                        label=method,
                    )
            axes.axhline(100 * PUBLISHED[split], color="grey", linestyle=":", linewidth=1, label="published, none")
            axes.set(title=split, xscale="log", xlabel="examples (10: none)")
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("accuracy, %")
        figure.axes[-1].legend(fontsize=6)
        figure.savefig(path, format="svg", metadata={"Date": None})


class _Known(Ensemble):
    """An ensemble whose parties' outputs on the shared examples are known already."""

    def __init__(self, method: str, parties: dict[str, Party], known: Outputs) -> None:
        super().__init__(method, parties)
        self.known = known

    def outputs_of(self, inputs: Tensor, batch_size: int = 512) -> Outputs:
        return self.known


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--split", action="append", choices=list(SPLITS))
    parser.add_argument("--only", choices=["train", "quick", "calibrated"], help=ONLY)
    parser.add_argument("--plot", type=Path, help="draw the records there are, and stop")
    given = parser.parse_args(arguments)
    if given.plot:
        plot(given.plot)
        return
    if given.data is None or given.work is None:
        parser.error("--data and --work are needed to measure")
    for seed in given.seed or [0]:
        data = load(given.data, seed)
        for split in given.split or list(SPLITS):
            folder = given.work / f"{split}-{seed}"
            for number in range(len(SPLITS[split])):
                if not (folder / f"{number}").exists():
                    started = time.perf_counter()
                    train(data, split, number, seed, folder / f"{number}")
                    print(
                        f"{split}, seed {seed}, party {number}: {time.perf_counter() - started:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
            if given.only == "train":
                continue
            there = list(record.load(RESULTS)) if RESULTS.exists() else []
            done = {(r.method, r.task, r.seed, r.parameters["examples"]) for r in there}
            for found in Run(data, split, seed, folder, done).all(given.only):
                record.append(RESULTS, [found])
                print(f"{split} {found.method:24} {found.parameters['examples']:5} {100 * found.value:.2f}", flush=True)


if __name__ == "__main__":
    main()
