"""Calls of DeepSeek V3 and V3.1: name and arguments between special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .parts import Call
from .tool_format import Notation, Tool, ToolFormat, alternatives
from .tool_parser import MAX_NAME_LENGTH, ToolParser, may_begin

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_NAME = rf"([^\s<｜]{{1,{MAX_NAME_LENGTH}}})"
#: V3 has the name behind the word "function", and the arguments in a code block.
_HEAD = re.compile(
    rf"\s{{0,8}}{_CALL}(?:function{_SEPARATOR}{_NAME}\s{{0,8}}```json\s{{0,8}}|{_NAME}{_SEPARATOR}\s{{0,8}})(?=\{{)"
)
#: Longer than any match of _HEAD.
_HEAD_WINDOW = MAX_NAME_LENGTH + 100
_AFTER = re.compile(rf"\s*(?:```)?\s*{_CALL_END}")
_FENCE = re.compile(r"\s*`{0,3}\s*")


class DeepSeek(ToolFormat):
    markers = (_BEGIN, _END, _CALL, _CALL_END, _SEPARATOR)
    opening = _BEGIN
    instruction = (
        f"For function calls, return nothing but {_BEGIN}, each call as\n"
        f"{_CALL}function{_SEPARATOR}<function name>\n"
        "```json\n"
        "<arguments as a JSON object>\n"
        f"```{_CALL_END}\n"
        f"and {_END} at the end."
    )

    def parser(self) -> DeepSeekParser:
        return DeepSeekParser()

    def render(self, calls: Sequence[Call]) -> str:
        texts = [
            f"{_CALL}function{_SEPARATOR}{call.name}\n```json\n{call.arguments or '{}'}\n```{_CALL_END}"
            for call in calls
        ]
        return _BEGIN + "\n".join(texts) + _END

    def grammar(self, tools: Sequence[Tool], notation: Notation, *, several: bool) -> str:
        more = ' ("\\n" call)*' if several else ""
        lines = [
            f"calls: {notation.marker(_BEGIN)} tail",
            f"tail: call{more} {notation.marker(_END)}",
            alternatives("call", tools),
        ]
        for number, tool in enumerate(tools):
            begin = f"{notation.marker(_CALL)} {notation.text('function')} {notation.marker(_SEPARATOR)}"
            name = notation.text(f"{tool.name}\n```json\n")
            end = f"{notation.text(chr(10) + '```')} {notation.marker(_CALL_END)}"
            lines.append(f"call_{number}: {begin} {name} arguments_{number} {end}")
            lines.append(f"arguments_{number}: {notation.json(tool.parameters)}")
        return "\n".join(lines)


class DeepSeekParser(ToolParser):
    opening, closing = _BEGIN, _CALL_END

    def _in_section(self, finished: bool) -> bool:
        """State before a call, also before the second one."""
        head = _HEAD.match(self._buffer, self._opened, self._opened + _HEAD_WINDOW)
        if head is not None:
            return self._begin(head[1] or head[2], head.end(), self._in_arguments)
        rest = self._buffer[self._opened :].lstrip()
        if rest.startswith(_END) and self.num_calls:
            return self._go(len(self._buffer) - len(rest) + len(_END), self._in_content)
        if not finished and len(rest) < _HEAD_WINDOW and _may_go_on(rest):
            return False
        if not self._opened and may_begin(rest, _END):
            return False
        return self._no_call()

    def _after_arguments(self, finished: bool) -> bool:
        after = _AFTER.match(self._buffer)
        if after is not None:
            return self._go(after.end(), self._in_section)
        fence = _FENCE.match(self._buffer)
        assert fence is not None, "the expression matches an empty text"
        rest = self._buffer[fence.end() :]
        if not rest or may_begin(rest, _CALL_END):
            # Left out if the text ends here.
            return False
        self._state = self._in_content
        return True


def _may_go_on(rest: str) -> bool:
    return not rest or rest.startswith(_CALL) or may_begin(rest, _CALL, _END)
