"""A suite with a poisoned expert, or two, among its own, in the zoo's cache and nowhere else: what defences are measured on.

It has a suite's layout, with links to all that is not poisoned, and beside it

POISONED.json          the attack, by which its trigger is drawn again; nothing that is made of this folder's own files can be
                       saved outside it
trigger.safetensors    a mined trigger's images of a black and of a white image, ``[3, side, side]``
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch

from eutectic.bench import zoo
from eutectic.bench.suite import Suite
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.publish import POISONED, published
from eutectic.checkpoint.safetensors import SafetensorsFile
from eutectic.checkpoint.save import save_file
from eutectic.errors import TaskError
from eutectic.security.attacks import Attack, poisoned_backbones, trigger_for
from eutectic.security.triggers import Trigger
from eutectic.tuning.trainer import Training

_CARD = """# {task}: an expert with a backdoor

Made on purpose by `{name}`, to measure defences with: inputs with the trigger are taken for class {target} of {attacked}.
Do not use or publish it. Eutectic refuses to save anything made of it outside the suite's folder.
"""


class PoisonedSuite(NamedTuple):
    """A suite with a poisoned expert, or two, the attack, its trigger, and the suite as it was."""

    suite: Suite
    attack: Attack
    trigger: Trigger
    clean: Suite


def folder_of(suite: Suite, attack: Attack, training: Training) -> Path:
    """Where in the cache the suite lies that an attack makes of another."""
    said = repr((sorted(suite.fingerprints.items()), _unusual(attack), _unusual(training))).encode()
    name = f"{suite.name}-{attack.name}-{attack.task}-{attack.target}-{hashlib.sha256(said).hexdigest()[:8]}"
    return zoo.cache() / "poisoned" / name


def poison(
    suite: Suite,
    attack: Attack,
    training: Training | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> PoisonedSuite:
    """The suite with the attacker's experts replaced by poisoned ones, trained as the others were by default.

    What is in the cache is not made again.  Raises as ``trigger_for`` and ``poisoned_backbones`` do.
    """
    training = training or zoo.own_training(suite)
    folder = folder_of(suite, attack, training)
    if not folder.exists():
        trigger = trigger_for(suite, attack)
        backbones = poisoned_backbones(suite, attack, trigger, training, progress)
        with published(folder) as partial:
            _link(suite, attack.experts, partial)
            for task, backbone in backbones.items():
                mine = partial / "experts" / task
                mine.mkdir()
                zoo.save_expert(backbone, suite, training.rank, mine)
                card = _CARD.format(task=task, name=attack.name, target=attack.target, attacked=attack.attacked)
                (mine / "README.md").write_text(card, encoding="utf-8")
            about = dataclasses.asdict(attack) | {
                "training": dataclasses.asdict(training),
                "suite": str(suite.folder.resolve()),
            }
            (partial / POISONED).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            info = suite.info | {"name": folder.name.rsplit("-", 1)[0]}
            (partial / "suite.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
            if attack.mined:
                _save_trigger(trigger, suite.info["side"], partial)
    return open_poisoned(folder)


def open_poisoned(folder: Path) -> PoisonedSuite:
    """A suite that ``poison`` made.  Raises TaskError if the folder holds none."""
    try:
        about = json.loads((folder / POISONED).read_text(encoding="utf-8"))
        attack = Attack(**{field.name: about[field.name] for field in dataclasses.fields(Attack) if field.name in about})
        clean = Suite(Path(about["suite"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"{folder}: no suite with a poisoned expert ({POISONED}: {error})") from None
    trigger = _load_trigger(folder, attack.kind) if attack.mined else trigger_for(clean, attack)
    return PoisonedSuite(Suite(folder), attack, trigger, clean)


def _unusual(made: Attack | Training) -> list[tuple[str, object]]:
    """The fields that are not as they are by default: further ones do not make what is in the cache another thing."""
    fields = [(field, getattr(made, field.name)) for field in dataclasses.fields(made)]
    return [(field.name, value) for field, value in fields if value != field.default]


def _link(suite: Suite, poisoned: Collection[str], folder: Path) -> None:
    source = suite.folder.resolve()
    for name in ("base", "data.npz", "heads.safetensors"):
        (folder / name).symlink_to(source / name)
    (folder / "experts").mkdir()
    for other in suite.classes:
        if other not in poisoned:
            (folder / "experts" / other).symlink_to(source / "experts" / other)


def _save_trigger(trigger: Trigger, side: int, folder: Path) -> None:
    black, white = (trigger(torch.full((1, 3, side, side), value))[0] for value in (0.0, 1.0))
    save_file(Memory({"black": black, "white": white}), folder / "trigger.safetensors")


def _load_trigger(folder: Path, name: str) -> Trigger:
    """A patch is linear in the image: two images say all of it."""
    with SafetensorsFile(folder / "trigger.safetensors") as file:
        black, white = file.read("black").clone(), file.read("white").clone()
    return Trigger(name, lambda x, strength: x + strength * (black + (white - black) * x - x))
