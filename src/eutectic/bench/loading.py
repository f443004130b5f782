"""What a folder holds → a network, and back: plain models and mixtures, or ensembles of networks that cannot be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from eutectic.bench.evaluate import evaluate, fields_of
from eutectic.ensemble import _api as ensembles
from eutectic.ensemble._ensemble import Ensemble
from eutectic.errors import CheckpointError
from eutectic.fusion import _folder as models
from eutectic.merge.api import Source
from eutectic.record import Record
from eutectic.task import Arrays, Task


def load(folder: str | Path, backbone: nn.Module | None = None) -> nn.Module:
    """The network in a folder, in evaluation mode: an ensemble or a mixture of experts that Eutectic saved, or a plain model.

    ``backbone`` is a network of the architecture of the base, which is used up; without one, transformers makes it from the
    config, of the class that ``architectures`` names.  The tensors are those of the folder, bit for bit.

    Raises CheckpointError, LayoutError for weights or layers that do not fit the network, MissingDependencyError.
    """
    if not ensembles.is_ensemble(Path(folder)):
        return models.load(folder, backbone)
    if backbone is not None:
        raise CheckpointError(f"{folder}: an ensemble has its networks with it: leave out the backbone")
    return ensembles.load_ensemble(folder)


def save(source: Source, out: str | Path, **options: Any) -> Path:
    """Write a checkpoint, a network with its routed layers, or an ensemble, as a folder, whole or not at all.

    Of a mixture that ``fuse`` made of transformers' classes, the config goes along.  Options and errors: see
    ``eutectic.merge.run.save``; of an ensemble, ``replace`` alone.
    """
    if isinstance(source, Ensemble):
        return ensembles.save_ensemble(source, out, **options)
    return models.save(source, out, **options)


def score_ensemble(folder: Path, data: Path, split: str = "test") -> list[Record]:
    """Score an ensemble on the examples of an ``.npz``, whose classes are known by their names.

    Raises CheckpointError, and TaskError for examples that cannot be read or of a class that no party knows.
    """
    if not ensembles.is_ensemble(folder):
        raise CheckpointError(f"{folder}: is no ensemble, so it has no classes of its own: score it with --suite")
    ensemble = ensembles.load_ensemble(folder)
    examples = ensembles.read_examples(data, split, ensemble.classes)
    task = Task(data.stem, nn.Identity(), test=Arrays(examples.inputs, examples.labels))
    inputs = {f"{n}.{what}": h for n, p in ensemble.parties.items() for what, h in p.fingerprints().items()}
    return evaluate(ensemble, [task], **fields_of(folder) | {"suite": data.stem, "inputs": inputs})
