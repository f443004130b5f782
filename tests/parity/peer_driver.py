"""Run by the peer's Python, not ours: merges many recipes with mergekit in one process, as its start costs seconds.

Usage: peer_driver.py JOBS, a JSON file with ``{"version": …, "jobs": [{"name", "recipe", "out"}]}``; the current folder is
the one with the models.  Prints a JSON object of those that failed, name → the error.
"""

import contextlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    failed = {}
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for job in jobs:
            try:
                merge(job["recipe"], Path(job["out"]), job.get("seed", 0))
            except Exception as error:  # whatever the peer says is the result
                failed[job["name"]] = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
    print(json.dumps(failed))


def merge(recipe: str, out: Path, seed: int) -> None:
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(1)
    if "\n---\n" in recipe:
        stream(recipe, out)
        return
    fixed = {"copy_tokenizer": False, "write_model_card": False, "quiet": True}
    options = MergeOptions(random_seed=seed, lora_merge_cache=str(out.parent / "adapted"), **fixed)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(out), options)


def stream(recipe: str, out: Path) -> None:
    from mergekit.scripts.multimerge import main as multi

    out.mkdir(parents=True)
    path = out.parent / f"{out.name}.yaml"
    path.write_text(recipe)
    arguments = [str(path), "--intermediate-dir", str(out / "parts"), "--out-path", str(out), "--quiet"]
    multi([*arguments, "--no-copy-tokenizer", "--no-write-model-card"], standalone_mode=False)


if __name__ == "__main__":
    main()
