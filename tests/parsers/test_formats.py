"""Names of formats, and plugins."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.parsers import formats
from fastdeploy.parsers.parts import Call

from .reading import calls_of, read

PLUGIN = """
from fastdeploy.parsers.formats import register
from fastdeploy.parsers.parts import Part
from fastdeploy.parsers.tool_format import ToolFormat
from fastdeploy.parsers.tool_parser import ToolParser

class Shouted(ToolFormat):
    def parser(self):
        return ShoutedParser()

    def render(self, calls):
        return " ".join(f"!{call.name}" for call in calls)

class ShoutedParser(ToolParser):
    opening = "!"

    def _start(self, finished):
        self._state = self._in_content
        return True

    def _in_section(self, finished):
        end = self._buffer.find(" ", self._opened)
        if end < 0 and not finished:
            return False
        end = len(self._buffer) if end < 0 else end
        self._begin(self._buffer[self._opened : end], end, self._after_arguments)
        self._add_arguments("{}")
        return True

    def _after_arguments(self, finished):
        self._state = self._in_content
        return True

register("shouted", Shouted())
"""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_TOOL_FORMATS", dict(formats._TOOL_FORMATS))


@pytest.mark.parametrize("name", ["hermes", "qwen25", "ernie-x1", "ernie-45-vl-thinking", "smollm2"])
def test_names_of_one_format(name: str) -> None:
    assert formats.tool_format(name) is formats.HERMES


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"--tool-call-parser is 'nope'; it must be one of .*hermes, .*pythonic"
    ):
        formats.tool_format("nope")
    with pytest.raises(ConfigError, match=r"--reasoning-parser is 'nope'; it must be one of .*deepseek_r1, "):
        formats.reasoning_format("nope")


@pytest.mark.usefixtures("registered")
def test_a_plugin_adds_a_format(tmp_path: Path) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    formats.load_plugin(file)
    parts = read(formats.tool_format("shouted"), "go !run !stop", [4, 6, 9])
    assert calls_of(parts) == [Call("run", "{}"), Call("stop", "{}")]


@pytest.mark.parametrize("source", ["1 / 0", "import no_such_module", "def"])
def test_a_broken_plugin_is_one_line_with_its_file(tmp_path: Path, source: str) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=r"--tool-parser-plugin .*plugin.py: \w+Error") as caught:
        formats.load_plugin(file)
    assert "\n" not in str(caught.value)
