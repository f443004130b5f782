"""Chat templates: which one a merged model gets, and where its folder keeps it.

A template is text here: it may be parsed, but it is never rendered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from eutectic.checkpoint._files import inside, read_json
from eutectic.checkpoint.tokenizer import read_text, write_json, write_text
from eutectic.errors import RecipeError, did_you_mean

MAX_TEMPLATE_BYTES = 1 << 20

#: In the tokenizers' dialect of Jinja: ``messages`` of ``role`` and ``content``, ``add_generation_prompt``, special tokens.
CHAT_TEMPLATES = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ (message.content | trim) ~ '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
    ),
    "mistral": (  # which has no role for the system: its words go before the user's next ones
        "{{- bos_token -}}"
        "{%- set pending = namespace(system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{%- set pending.system = message.content ~ '\\n\\n' -%}"
        "{%- elif message.role == 'user' -%}"
        "{{ '[INST] ' ~ pending.system ~ message.content ~ ' [/INST]' }}{%- set pending.system = '' -%}"
        "{%- else -%}{{ ' ' ~ (message.content | trim) ~ eos_token }}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "alpaca": (
        "{{- bos_token -}}"
        "{%- if not messages or messages[0].role != 'system' -%}"
        "{{ 'Below is an instruction that describes a task. ' }}"
        "{{ 'Write a response that appropriately completes the request.\\n\\n' }}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{ message.content ~ '\\n\\n' }}"
        "{%- elif message.role == 'user' -%}{{ '### Instruction:\\n' ~ message.content ~ '\\n\\n' }}"
        "{%- else -%}{{ '### Response:\\n' ~ message.content ~ eos_token ~ '\\n\\n' }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
    "exaone": (  # which always has a system turn, if an empty one
        "{%- if not messages or messages[0].role != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{ '[|' ~ message.role ~ '|]' ~ message.content ~ ('' if message.role == 'user' else '[|endofturn|]') ~ '\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}"
    ),
}


def choose_chat_template(choice: str, folders: Mapping[str, Path], base: str | None = None) -> str | None:
    """The template that a recipe's ``chat_template`` means: a built-in's name, a literal one, or ``auto``.

    ``auto`` is the one that most of the models in ``folders`` have, the base's or else the earliest if several lead, and
    None if no model has any.  A literal template is parsed to see that it is one, never rendered.  Raises RecipeError.
    """
    if choice == "auto":
        found = {name: read_chat_template(folder) for name, folder in folders.items()}
        votes = Counter(template for template in found.values() if template is not None)
        leading = [template for template, count in votes.items() if count == max(votes.values())]
        favourite = found.get(base) if base is not None else None
        return favourite if favourite in leading else next(iter(leading), None)
    if choice in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[choice]
    if len(choice) < 20 or "{" not in choice:
        raise RecipeError(
            f"chat_template: {choice!r} is neither `auto`, nor a built-in, nor a Jinja template."
            f"{did_you_mean(choice, ['auto', *CHAT_TEMPLATES])}"
        )
    _require_jinja(choice)
    return choice


def read_chat_template(folder: str | Path) -> str | None:
    """A model's (default) chat template, wherever its tokenizer keeps it; None if it has none.  Raises CheckpointError."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return read_text(inside(folder, "chat_template.jinja"), MAX_TEMPLATE_BYTES)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not (folder / name).is_file():
            continue
        found = read_json(inside(folder, name)).get("chat_template")
        if isinstance(found, list):
            found = next((x.get("template") for x in found if isinstance(x, dict) and x.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def write_chat_template(template: str, target: str | Path) -> None:
    """Give a folder this chat template: chat_template.jinja, and, for older readers, the JSON files that are there."""
    target = Path(target)
    write_text(target / "chat_template.jinja", template)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (target / name).is_file():
            config = read_json(target / name)
            write_json(target / name, config, {**config, "chat_template": template})


def _require_jinja(template: str) -> None:
    from jinja2 import TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    if len(template.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
        raise RecipeError(f"chat_template: is longer than {MAX_TEMPLATE_BYTES} bytes. Shorten it.")
    # transformers' own tag, which marks what to train on
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)
    try:
        SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f" (its line {line})" if line else ""
        raise RecipeError(f"chat_template: is no Jinja template{where}: {error}") from None
