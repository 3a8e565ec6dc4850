"""Names of formats, and plugins."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.parsers import formats
from fastdeploy.parsers.parts import Call

from .reading import calls_of, read

DOCS = Path(__file__).parents[2] / "docs" / "api.md"


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
def test_the_documented_plugin_adds_a_format(tmp_path: Path) -> None:
    _, _, rest = DOCS.read_text().partition("`--tool-parser-plugin FILE`")
    file = tmp_path / "plugin.py"
    file.write_text(rest.partition("```python\n")[2].partition("```")[0])
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
