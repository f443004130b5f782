"""What `import eutectic` offers, and what it costs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import eutectic

HEAVY = {"torch", "numpy", "pydantic", "rich", "typer", "ruamel", "transformers", "matplotlib", "ray", "jinja2"}


def loaded_after(code):
    """The top-level modules that a fresh interpreter has loaded after running the code."""
    report = "import json, sys; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    program = f"try:\n    exec({code!r})\nexcept SystemExit as done:\n    assert not done.code\n{report}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1])), done.stdout


def test_importing_is_light():
    modules, _ = loaded_after("import eutectic; dir(eutectic); eutectic.__all__")
    assert "eutectic" in modules
    assert modules & HEAVY == set()


def test_help_is_light():
    modules, out = loaded_after("import sys; sys.argv = ['eutectic', '--help']; from eutectic.cli import main; main()")
    assert "merge" in out
    assert modules & (HEAVY - {"typer", "rich"}) == set()


@pytest.mark.parametrize("name", eutectic.__all__)
def test_every_name_loads_and_is_documented(name):
    found = getattr(eutectic, name)
    assert found.__doc__
    assert name in dir(eutectic)


def test_all_names_are_lazy_and_typed():
    assert list(eutectic._HOMES) == eutectic.__all__
    assert sorted(eutectic.__all__) == eutectic.__all__
    for name, home in eutectic._HOMES.items():
        found = getattr(eutectic, name)
        # the room `merge` may stand for the verb, if it can be called
        room = isinstance(found, ModuleType) and callable(found)
        assert room or found is getattr(importlib.import_module(f"eutectic.{home}"), name), name
    source = Path(eutectic.__file__).read_text(encoding="utf-8")
    for name, home in eutectic._HOMES.items():
        assert f"from eutectic.{home} import {name} as {name}" in source, f"type checkers do not see {name}"


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = eutectic.nonsense


def test_the_promised_names_are_there():
    promised = {"open", "merge", "save", "state_dict", "Task", "evaluate", "Record", "Recipe", "Checkpoint", "diff"}
    assert promised <= set(eutectic.__all__)


def test_errors_are_one_tree_and_drawn_in_it():
    from eutectic import errors

    drawn = errors.__doc__
    for name, found in vars(errors).items():
        if isinstance(found, type) and issubclass(found, Exception):
            assert issubclass(found, errors.EutecticError)
            assert name in drawn, f"{name} is missing from the tree"


def test_every_module_says_what_it_is():
    import pkgutil

    for info in pkgutil.walk_packages(eutectic.__path__, "eutectic."):
        if info.name.endswith("__main__"):
            continue
        assert importlib.import_module(info.name).__doc__, info.name
