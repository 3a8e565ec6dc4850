"""Writes docs/configuration.md: ``python -m fastdeploy.daemon.config.documentation``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from msgspec import NODEFAULT

from .declaration import Option, options_of
from .loader import old_names
from .options import SECTIONS


def document() -> str:
    """Return docs/configuration.md."""
    lines = [
        "# dp.toml",
        "",
        "Generated from the declarations in `daemon/config/options.py` by `make docs`.",
        "Every option except `[model] path` has a default. Unknown sections and keys are errors.",
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"## [{section}]", "", (cls.__doc__ or "").strip(), ""]
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for option in options_of(cls).values():
            unit = f" ({option.unit})" if option.unit else ""
            kind = f"{option.kind_name}{unit}" + (f", {option.range}" if option.range else "")
            lines.append(f"| `{option.name}` | {kind} | {_shown(option)} | {option.help} |")
    lines += ["", "## Old names", "", "These names are still accepted; fd-dp and `fdctl check` report them."]
    lines += ["", "| section | old name | new name |", "|---|---|---|"]
    for section in SECTIONS:
        lines += [f"| `[{section}]` | `{old}` | `{new}` |" for old, new in old_names(section).items()]
    return "\n".join(lines) + "\n"


def _shown(option: Option) -> str:
    value = option.default
    if value is NODEFAULT:
        return "**required**"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == Path():
        return '`""`'
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`"
    return "`{}`" if isinstance(value, Mapping) else f"`{value:g}`"


if __name__ == "__main__":
    print(document(), end="")
