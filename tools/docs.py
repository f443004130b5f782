"""Write docs/methods.md and docs/cli.md anew from the code; with --check, fail if they are not what is there."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from eutectic import cli, registry
from eutectic.methods._method import signature_model

DOCS = Path(__file__).parent.parent / "docs"


def methods_page() -> str:
    """Every registered method: its docstring, parameters and source."""
    parts = ["# Methods\n\nWritten by `make docs` from the docstrings.  `eutectic methods NAME` prints the same.\n"]
    for room, title in (("methods", "Closed form"), ("fusion", "Fitted to data")):
        parts.append(f"# {title}\n")
        for name in registry.names(room):
            doc, source = inspect.getdoc(registry.get(room, name)) or "", registry.reference(room, name)
            parts.append(f"## {name}\n\n```text\n{doc}\n```\n\n{_parameters(name)}\n\nReference: {source}.\n")
    return "\n".join(parts)


def _parameters(name: str) -> str:
    lines = ["| parameter | default | type and range |", "|---|---|---|"]
    for key, field in signature_model(name).model_json_schema()["properties"].items():
        rest = ", ".join(f"{k} {v}" for k, v in field.items() if k not in ("title", "default"))
        lines.append(f"| `{key}` | `{field.get('default')}` | {rest.replace('|', '∣')} |")
    return "\n".join(lines)


def cli_page() -> str:
    """The help of every command."""
    parts = ["# Command line\n\nWritten by `make docs` from `--help`.\n"]
    for path in [[], *_commands(cli.app)]:
        text = CliRunner().invoke(cli.app, [*path, "--help"], prog_name="eutectic", env={"COLUMNS": "110"}).output
        parts.append(f"## {' '.join(['eutectic', *path])}\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _commands(app: typer.Typer) -> list[list[str]]:
    names = [[c.name or str(c.callback and c.callback.__name__)] for c in app.registered_commands]
    for group in app.registered_groups:
        names += [[str(group.name), *path] for path in ([], *_commands(group.typer_instance or typer.Typer()))]
    return names


def main() -> int:
    """Write the pages, or compare them."""
    stale = 0
    for name, text in (("methods.md", methods_page()), ("cli.md", cli_page())):
        path = DOCS / name
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what the code says: run `make docs`", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
