"""What a party hands over: a folder with its classifier, its density, its classes and how many samples of each it had.

    party.json                     classes, counts, the form of an input, and how both models are made
    classifier/model.safetensors   with config.json if it is a model of transformers
    density/model.safetensors      if it has one

No sample is in it, and no code: neither is read from a folder that holds pickles.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from eutectic.checkpoint._files import read_json
from eutectic.checkpoint.base import Checkpoint, Memory, live
from eutectic.checkpoint.folder import PICKLE_ADVICE, PICKLES, open_folder
from eutectic.checkpoint.hashed import fingerprint
from eutectic.checkpoint.publish import published
from eutectic.checkpoint.save import save_tensors
from eutectic.checkpoint.spec import require_same_layout
from eutectic.ensemble._density import Density, Space
from eutectic.ensemble._flow import RealNVP
from eutectic.ensemble._gaussians import Gaussians, Kernels
from eutectic.ensemble._networks import (
    Architecture,
    Classifier,
    Described,
    Normalisation,
    Transformers,
    described,
    from_transformers,
)
from eutectic.errors import CheckpointError, TaskError
from eutectic.merge.api import state_dict
from eutectic.methods._method import Count

_FILE = "party.json"
DensityModel = Annotated[Gaussians | Kernels | RealNVP, Field(discriminator="kind")]


class About(Described):
    """``party.json``: ``shape`` is that of an input, in the form that all parties share; images are ``[C, H, W]`` in 0 … 1."""

    format: Literal["eutectic_party"] = "eutectic_party"
    version: Literal[1] = 1
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    counts: Annotated[tuple[Count, ...], Field(min_length=1)]
    shape: Annotated[tuple[Count, ...], Field(min_length=1)]
    classifier: Architecture
    normalisation: Normalisation = Normalisation()
    space: Space | None = None
    density: DensityModel | None = None

    def network(self) -> Classifier:
        """The classifier, untrained.  Raises CheckpointError."""
        if isinstance(self.classifier, Transformers):
            raise CheckpointError("a model of transformers is made by transformers, and then handed over")
        return Classifier(self.classifier.build(self.shape, len(self.classes)), self.normalisation, self.shape)


@dataclasses.dataclass(frozen=True)
class Party:
    """A party's models in memory."""

    about: About
    classifier: Classifier
    density: Density | None = None
    origin: str = "memory"

    def log_predictions(self, inputs: Tensor) -> Tensor:
        """Log p(y | x) over its own classes, ``[B, c]``."""
        return self.classifier(inputs).float().log_softmax(1)

    def log_density(self, inputs: Tensor) -> Tensor:
        """Log p(x), ``[B]``, in nats.  Raises CheckpointError if it has no density."""
        density, space = self._density()
        return density.log_prob(space.into(inputs))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Inputs ``[n, *shape]`` from its density.  Raises CheckpointError if it has none."""
        density, space = self._density()
        return space.back(density.sample(n, generator), self.about.shape)

    def _density(self) -> tuple[Density, Space]:
        if self.density is None or self.about.space is None:
            raise CheckpointError(f"{self.origin}: has no density model; train one, or combine by mean_ensemble")
        return self.density, self.about.space

    def fingerprints(self) -> dict[str, str]:
        """The content hashes of its models."""
        models = {"classifier": self.classifier.network} | ({} if self.density is None else {"density": self.density})
        return {name: fingerprint(_saved(model)) for name, model in models.items()}


def learn_density(about: About, inputs: Tensor, labels: Tensor, seed: int = 0) -> Density:
    """Fit the density that a party describes to its inputs ``[n, *shape]`` and labels ``[n]``.

    Raises TaskError for no samples, a class without any, or other inputs, CheckpointError if it describes no density.
    """
    if about.density is None or about.space is None:
        raise CheckpointError("the party describes no density: give a `density` and a `space`")
    if inputs.shape[1:] != about.shape:
        raise TaskError(f"inputs {list(inputs.shape)} are not of the shape {list(about.shape)} that the party describes")
    return about.density.fit(about.space.into(inputs), labels, seed)


def write_party(party: Party, folder: str | Path, *, replace: bool = False) -> None:
    """Write a party's folder, whole or not at all.  Raises OutputError."""
    with published(folder, replace=replace) as partial:
        put_party(party, partial)


def put_party(party: Party, folder: Path) -> None:
    """Write the files of a party into an existing folder."""
    models = {"classifier": party.classifier.network} | ({} if party.density is None else {"density": party.density})
    for name, model in models.items():
        (folder / name).mkdir()
        save_tensors(_saved(model), folder / name)
    if isinstance(party.about.classifier, Transformers):
        text = json.dumps(party.classifier.network.config.to_dict(), indent=2)  # pyrefly: ignore
        (folder / "classifier" / "config.json").write_text(text + "\n", encoding="utf-8")
    about = json.dumps(party.about.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / _FILE).write_text(about + "\n", encoding="utf-8")


def open_party(folder: str | Path) -> Party:
    """Read a party's folder.

    Raises CheckpointError for what is missing, inconsistent or a pickle, LayoutError for tensors that do not fit.
    """
    folder = Path(folder)
    pickled = next((path for path in sorted(folder.rglob("*")) if path.suffix in PICKLES), None)
    if pickled is not None:
        raise CheckpointError(f"{pickled}: is a pickle, so nothing of {folder} is read. {PICKLE_ADVICE}")
    path = folder / _FILE
    about: About = described(About, read_json(path), str(path))
    if len(about.counts) != len(about.classes) or len(set(about.classes)) < len(about.classes):
        raise CheckpointError(f"{path}: {len(about.classes)} classes (each once) need as many counts, not {len(about.counts)}")
    if (about.space is None) != (about.density is None):
        raise CheckpointError(f"{path}: a `density` needs a `space`, and the other way round")
    if isinstance(about.classifier, Transformers):
        network = from_transformers(folder / "classifier")
        outputs = getattr(network.config, "num_labels", None)  # pyrefly: ignore
        if outputs != len(about.classes):
            raise CheckpointError(f"{folder / 'classifier'}: gives {outputs} logits for {len(about.classes)} classes")
        classifier = Classifier(network, about.normalisation, about.shape)
    else:
        with torch.device("meta"):  # sizes are a stranger's words: nothing is allocated before the file agrees
            classifier = about.network()
        _fill(classifier.network, open_folder(folder / "classifier"))
    density = None
    if about.density is not None and about.space is not None:
        weights, dims = open_folder(folder / "density"), about.space.dims(about.shape)
        with torch.device("meta"):
            density = about.density.empty(weights.specs, dims)
        _fill(density, weights)
        density.eval()
    return Party(about, classifier.eval(), density, str(folder))


def _fill(network: nn.Module, weights: Checkpoint) -> None:
    require_same_layout(live(network).specs, weights.specs, "the network that party.json describes", weights.origin)
    network.load_state_dict(state_dict(weights), assign=True)


def _saved(model: nn.Module) -> Memory:
    return Memory({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, type(model).__name__)


def require_comparable(parties: Sequence[Party], names: Sequence[str], *, densities: bool) -> None:
    """Refuse parties whose inputs, or whose densities' spaces, are not the same: CheckpointError naming them.

    Log-densities in different spaces have different units, and their differences say nothing.
    """
    first = parties[0]
    for name, party in zip(names, parties, strict=True):
        if party.about.shape != first.about.shape:
            raise CheckpointError(
                f"party {name!r} ({party.origin}) takes inputs {list(party.about.shape)}, but {names[0]!r} "
                f"{list(first.about.shape)}: bring them to one form before the parties' own normalisation"
            )
        if densities and party.density is None:
            raise CheckpointError(
                f"party {name!r} ({party.origin}) has no density model: it has to train one; or use mean_ensemble"
            )
        if densities and party.about.space != first.about.space:
            raise CheckpointError(
                f"party {name!r} ({party.origin}) has its density over {party.about.space}, but {names[0]!r} over "
                f"{first.about.space}: log-densities compare in one space only, so one of them has to train its density anew"
            )
