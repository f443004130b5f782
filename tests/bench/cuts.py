"""Small suites cut out of the packaged one."""

import json

import numpy as np

from eutectic.bench import zoo
from eutectic.task import SPLITS


def cut(folder, tasks, sizes):
    """Write a suite of these tasks, with the first samples of each split, ``sizes`` of them, into an existing folder."""
    for part in ("base", "experts", "heads.safetensors"):
        (folder / part).symlink_to(zoo.packaged() / part)
    whole, stored = zoo.open_suite("mini"), {}
    for task in tasks:
        for split in SPLITS:
            arrays = whole.arrays(task, split)
            stored[f"{task}.{split}.inputs"] = arrays.inputs[: sizes[split]].numpy()
            stored[f"{task}.{split}.labels"] = arrays.labels[: sizes[split]].numpy()
    np.savez(folder / "data.npz", **stored)
    info = whole.info | {"name": "cut", "tasks": {task: whole.classes[task] for task in tasks}}
    (folder / "suite.json").write_text(json.dumps(info))
    return folder
