"""Calls as `<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen, ERNIE-X1, SmolLM2."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .json_calls import JsonCallParser
from .parts import Call
from .tool_format import Notation, Tool, ToolFormat, json_call, object_rules
from .tool_parser import may_begin

_BEGIN, _END = "<tool_call>", "</tool_call>"
_AFTER = re.compile(r"\s*(?:(,)|\]?\s*</tool_call>)")


class Hermes(ToolFormat):
    markers = (_BEGIN, _END)
    opening = _BEGIN
    instruction = (
        "For each function call, return a JSON object with the name and the arguments of the function within "
        "<tool_call></tool_call> tags:\n"
        "<tool_call>\n"
        '{"name": <function name>, "arguments": <arguments as a JSON object>}\n'
        "</tool_call>"
    )

    def parser(self) -> HermesParser:
        return HermesParser()

    def render(self, calls: Sequence[Call]) -> str:
        return "\n".join(f"{_BEGIN}\n{json_call(call)}\n{_END}" for call in calls)

    def grammar(self, tools: Sequence[Tool], notation: Notation, *, several: bool) -> str:
        more = f' ("\\n" {notation.marker(_BEGIN)} call)*' if several else ""
        lines = [
            f"calls: {notation.marker(_BEGIN)} tail",
            f"tail: call{more}",
            f'call: "\\n" object "\\n" {notation.marker(_END)}',
        ]
        return "\n".join([*lines, object_rules(tools, notation)])


class HermesParser(JsonCallParser):
    opening, closing = _BEGIN, _END

    def _after_object(self, finished: bool) -> bool:
        after = _AFTER.match(self._buffer)
        if after is not None:
            return self._go(after.end(), self._in_section if after[1] else self._in_content)
        rest = self._buffer.lstrip().removeprefix("]").lstrip()
        if not rest or may_begin(rest, _END):
            # Left out if the text ends here.
            return False
        self._state = self._in_content
        return True
