"""The peer in an environment of its own: installed once, then one process for all recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import torch

VERSION = "0.1.5"
DRIVER = Path(__file__).with_name("peer_driver.py")
_ASK = "import importlib.metadata as m; print(m.version('mergekit'))"


def folder() -> Path:
    """Where peers are kept: ``EUTECTIC_PEERS``, else in the user's cache."""
    given = os.environ.get("EUTECTIC_PEERS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "eutectic" / "peers"


def mergekit() -> Path:
    """The Python of an environment with mergekit, made if it is not there (minutes); the torch is this interpreter's."""
    root = folder() / "mergekit"
    python = root / "bin" / "python"
    if _version(python) != VERSION:
        venv.create(root, with_pip=True, clear=True)
        constraints = root / "constraints.txt"
        constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        wanted = ["install", "-qq", "--disable-pip-version-check", "-c", str(constraints), f"mergekit=={VERSION}"]
        subprocess.run([python, "-m", "pip", *wanted], check=True)
    return python


def _version(python: Path) -> str:
    if not python.exists():
        return "none"
    return subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=False).stdout.strip()


def run(python: Path, root: Path, jobs: Sequence[dict[str, object]]) -> dict[str, str]:
    """Merge in one process, beside the models in ``root``; the errors of those that failed, by name."""
    path = root / "jobs.json"
    path.write_text(json.dumps(list(jobs)))
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([python, DRIVER, path], cwd=root, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(f"{python} {DRIVER.name} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
