"""Three parties in the plane, each with a few of five classes and a network of its own: who decides where, and how likely.

    python examples/reuse/toy.py OUT

Writes OUT/left, OUT/middle and OUT/right, the folders that the parties would hand over, and OUT/regions.svg if matplotlib is
installed (eutectic[plots]): what the most certain party says of each point, what density reuse says, and
the parties' densities.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import eutectic as eu
from eutectic.ensemble._density import Flat
from eutectic.ensemble._gaussians import Gaussians, Kernels
from eutectic.ensemble._networks import MLP
from eutectic.ensemble._party import About, Party, learn_density, write_party
from eutectic.task import Arrays, Task
from eutectic.tuning.trainer import Training, fine_tune

CENTRES = torch.tensor([[-3.0, 0.0], [-1.5, 2.0], [0.0, -1.0], [1.5, 1.5], [3.0, -0.5]])
#: overlapping label sets, networks of different widths
PARTIES = {"left": ((0, 1), (8,)), "middle": ((2, 3), (16, 16)), "right": ((3, 4), (32,))}


def points(classes: tuple[int, ...], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` points of each class, and their places among these classes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(classes)).repeat_interleave(n)
    noise = 0.6 * torch.randn(len(labels), 2, generator=random)
    return CENTRES[list(classes)][labels] + noise, labels


def hand_over(name: str, folder: Path) -> None:
    """What a party does by itself: train a classifier and a density, and write them into a folder."""
    (classes, widths), seed = PARTIES[name], list(PARTIES).index(name)
    inputs, labels = points(classes, 200, seed)
    about = About(
        classes=tuple(f"class {c}" for c in classes),
        counts=tuple(labels.bincount().tolist()),
        shape=(2,),
        classifier=MLP(widths=widths),
        space=Flat(),
        density=Kernels(centres=20) if name == "left" else Gaussians(components=2),
    )
    torch.manual_seed(seed)
    classifier = about.network()
    fine_tune(classifier, nn.Identity(), Arrays(inputs, labels), Training(steps=200, lr=1e-2))
    write_party(Party(about, classifier, learn_density(about, inputs, labels)), folder, replace=True)


def draw(out: Path, folders: dict[str, Path]) -> None:
    """Three panels as one SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    axis = torch.linspace(-5, 5, 120)
    grid = torch.cartesian_prod(axis, axis)
    reuse = eu.combine("density_reuse", folders)
    with torch.no_grad():
        shown = {name: eu.combine(name, folders)(grid).argmax(1) for name in ("max_ensemble", "density_reuse")}
        densities = {name: party.log_density(grid).view(120, 120).T for name, party in reuse.parties.items()}
    inputs, _ = points(tuple(range(5)), 40, 9)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "toy", "font.size": 8}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        panels = figure.subplots(1, 3)
        for panel, (name, regions) in zip(panels, shown.items(), strict=False):
            panel.contourf(axis, axis, regions.view(120, 120).T, levels=[x - 0.5 for x in range(6)], cmap="Set2", alpha=0.6)
            panel.plot(*inputs.T, "k.", markersize=1.5)
            panel.set_title(name)
        for colour, (name, log_p) in zip("rgb", densities.items(), strict=True):
            panels[2].contour(axis, axis, log_p, levels=[-8, -5, -3], colors=colour, linewidths=0.8)
            panels[2].plot([], [], colour, label=name)
        panels[2].legend(fontsize=6)
        panels[2].set_title("log p(x) = −8, −5, −3 of each party")
        figure.savefig(out, format="svg", metadata={"Date": None})


def main(out: Path) -> None:
    """Make the parties, score what they are together, and draw."""
    folders = {name: out / name for name in PARTIES}
    for name, folder in folders.items():
        hand_over(name, folder)
    task = Task("toy", nn.Identity(), test=points(tuple(range(5)), 400, 7))
    for method in ("max_ensemble", "mean_ensemble", "density_reuse"):
        print(f"{method:14} {100 * eu.evaluate(eu.combine(method, folders), [task])[0].value:.1f} %")
    try:
        draw(out / "regions.svg", folders)
    except ImportError:
        print("no figure: pip install 'eutectic[plots]'")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("parties"))
