"""Formats of tool calls and of reasoning by the names that FastDeploy and vLLM use, and plugins."""

from __future__ import annotations

import runpy
from pathlib import Path

from ..common.errors import ConfigError
from ..common.foreign_text import printable
from .deepseek import DeepSeek
from .hermes import Hermes
from .llama3_json import Llama3Json
from .mistral import Mistral
from .pythonic import Pythonic
from .reasoning import ReasoningFormat
from .tool_format import ToolFormat

HERMES = Hermes()
_DEEPSEEK, _LLAMA3 = DeepSeek(), Llama3Json()
_TOOL_FORMATS: dict[str, ToolFormat] = {
    **dict.fromkeys(("hermes", "qwen25", "qwen", "smollm2", "ernie-x1", "ernie-45-vl-thinking"), HERMES),
    **dict.fromkeys(("ernie_x1", "ernie_45_vl_thinking"), HERMES),
    **dict.fromkeys(("llama3_json", "llama4_json", "llama3"), _LLAMA3),
    **dict.fromkeys(("pythonic", "llama4_pythonic"), Pythonic()),
    "mistral": Mistral(),
    **dict.fromkeys(("deepseek", "deepseek_v3", "deepseekv3", "deepseek_v31", "deepseekv31"), _DEEPSEEK),
}
_THINK, _ERNIE_X1 = ReasoningFormat(), ReasoningFormat(("<response>", "</response>"))
_REASONING_FORMATS: dict[str, ReasoningFormat] = {
    **dict.fromkeys(("ernie-x1", "ernie_x1"), _ERNIE_X1),
    **dict.fromkeys(("ernie-45-vl-thinking", "ernie-45-vl", "ernie45"), _THINK),
    **dict.fromkeys(("qwen3", "deepseek_r1", "deepseek-r1", "deepseek"), _THINK),
}


def register(name: str, tool_format: ToolFormat) -> None:
    """Add a format, for plugins. A format with this name is replaced."""
    _TOOL_FORMATS[name] = tool_format


def load_plugin(file: Path) -> None:
    """Execute a plugin, which registers formats.

    Raises:
        ConfigError: it cannot be read or fails.
    """
    try:
        runpy.run_path(str(file))
    # The code of a user may fail in any way.
    except Exception as error:
        raise ConfigError(
            f"--tool-parser-plugin {file}: {type(error).__name__}: {printable(str(error))}"
        ) from None


def tool_format(name: str) -> ToolFormat:
    """Return the format for --tool-call-parser. Raises ConfigError."""
    if name not in _TOOL_FORMATS:
        raise ConfigError(_unknown("--tool-call-parser", name, tool_format_names()))
    return _TOOL_FORMATS[name]


def reasoning_format(name: str) -> ReasoningFormat:
    """Return the format for --reasoning-parser. Raises ConfigError."""
    if name not in _REASONING_FORMATS:
        raise ConfigError(_unknown("--reasoning-parser", name, reasoning_format_names()))
    return _REASONING_FORMATS[name]


def tool_format_names() -> list[str]:
    return sorted(_TOOL_FORMATS)


def reasoning_format_names() -> list[str]:
    return sorted(_REASONING_FORMATS)


def _unknown(flag: str, name: str, names: list[str]) -> str:
    return f"{flag} is {name!r}; it must be one of {', '.join(names)}"
