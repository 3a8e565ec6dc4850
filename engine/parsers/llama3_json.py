"""Calls as bare JSON objects, separated by semicolons: Llama 3."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .json_calls import JsonCallParser
from .parts import Call
from .tool_format import Notation, Tool, ToolFormat, alternatives, json_call
from .tool_parser import may_begin

_TAG = "<|python_tag|>"
_BEGIN = re.compile(r"\s*(?:<\|python_tag\|>\s*)?(?:\[\s*)?(?=\{)")
_NEXT = re.compile(r"\s*[;,]\s*(?=\{)")
_BETWEEN = re.compile(r"\s*[;,\]]?\s*")


class Llama3Json(ToolFormat):
    markers = (_TAG,)
    instruction = (
        'For a function call, return nothing but {"name": <function name>, "parameters": <arguments as a '
        "JSON object>}. Separate several calls with semicolons."
    )

    def parser(self) -> Llama3JsonParser:
        return Llama3JsonParser()

    def render(self, calls: Sequence[Call]) -> str:
        return "; ".join(json_call(call, "parameters") for call in calls)

    def grammar(self, tools: Sequence[Tool], notation: Notation, *, several: bool) -> str:
        more = ' ("; " object)*' if several else ""
        lines = [f"calls: object{more}", alternatives("object", tools)]
        for number, tool in enumerate(tools):
            # As a schema, because a content may be JSON too.
            lines.append(f"object_{number}: {notation.json(_schema(tool))}")
        return "\n".join(lines)


def _schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a call as an object."""
    return tool.definitions | {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": tool.parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


class Llama3JsonParser(JsonCallParser):
    """A text that does not begin with a call has none, unless the tag announces it."""

    opening = _TAG
    needs_arguments = True

    def _start(self, finished: bool) -> bool:
        begin = _BEGIN.match(self._buffer)
        if begin is not None:
            self._opened = begin.end()
            self._state = self._in_section
            return True
        rest = self._buffer.lstrip()
        tagless = rest.removeprefix(_TAG).lstrip()
        if not finished and (may_begin(rest, _TAG) or not tagless.removeprefix("[").lstrip()):
            return False
        self._state = self._in_content
        return True

    def _after_object(self, finished: bool) -> bool:
        following = _NEXT.match(self._buffer)
        if following is not None:
            return self._go(following.end(), self._in_section)
        if _BETWEEN.fullmatch(self._buffer):
            return False
        self._state = self._in_content
        return True
