"""Both programs on the same recipes: fixtures that run the peer once, and us when asked; tests of peers run only when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.parity import models, peers, shapes
from tests.parity.cases import CASES, SAMPLED, bfloat16, halved
from tests.parity.faults import AGAIN, FAULTS
from torch import Tensor

from eutectic.merge.mergekit import parse_mergekit

WORST = pytest.StashKey[dict[tuple[str, str], list[float]]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a peer, unless ``-m`` says its name: the peer has to be installed, which takes minutes and a network."""
    if "peer" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("peer"):
                item.add_marker(pytest.mark.skip(reason="compares with an installed peer: make parity, or -m peer"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WORST] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The worst distance of each method."""
    found = config.stash[WORST]
    if found:
        terminalreporter.section("largest distance from the peer, in steps of bfloat16 (number of comparisons)")
        kinds = sorted({kind for _, kind in found})
        terminalreporter.write_line(" " * 18 + "".join(f"{kind:>16}" for kind in kinds))
        for method in sorted({method for method, _ in found}):
            each = [found.get((method, kind), []) for kind in kinds]
            cells = [f"{max(distances):.2g} ({len(distances)})" if distances else "" for distances in each]
            terminalreporter.write_line(f"{method:<18}" + "".join(f"{cell:>16}" for cell in cells))


@dataclass(frozen=True)
class Peer:
    """What the peer made of all recipes."""

    root: Path
    failed: dict[str, str]

    def model(self, name: str) -> dict[str, Tensor]:
        """The tensors that it wrote."""
        assert name not in self.failed, self.failed[name]
        return load_file(self.folder(name) / "model.safetensors")

    def folder(self, name: str) -> Path:
        """Where it wrote them."""
        return self.root / "out" / name


def recipes() -> dict[str, str]:
    """All that the peer is given, by name."""
    found = CASES | SAMPLED | FAULTS | shapes.SHAPES
    found |= {f"{name}/half": halved(text) for name, text in CASES.items()}
    return (
        found
        | {f"{name}/again": FAULTS[name] for name in AGAIN}
        | {f"{name}/bfloat16": bfloat16(CASES[name]) for name in CASES}
    )


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """All recipes, merged by mergekit."""
    root = tmp_path_factory.mktemp("parity")
    models.write_all(root)
    shapes.write_all(root)
    jobs = [
        {"name": name, "recipe": text, "out": str(root / "out" / name), "seed": int(name.endswith("/again"))}
        for name, text in recipes().items()
    ]
    return Peer(root, peers.run(peers.mergekit(), root, jobs))


@pytest.fixture
def ours(peer: Peer) -> Callable[[str], dict[str, Tensor]]:
    """A function that merges a recipe under ``--compat mergekit``."""

    def merge(text: str) -> dict[str, Tensor]:
        with parse_mergekit(text, "recipe.yaml", compat=True).open(peer.root) as merged:
            return {name: merged.read(name) for name in merged.specs}

    return merge


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, str, float], None]:
    """A function that keeps a method's distance for the summary, under the kind of comparison."""
    found = request.config.stash[WORST]
    return lambda method, kind, distance: found.setdefault((method, kind), []).append(distance)
