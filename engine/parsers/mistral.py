"""Calls as `[TOOL_CALLS][{"name": ..., "arguments": ...}]` or `[TOOL_CALLS]name[ARGS]{...}`: Mistral."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .json_calls import JsonCallParser
from .parts import Call
from .tool_format import Notation, Tool, ToolFormat, json_call, object_rules
from .tool_parser import MAX_NAME_LENGTH

_BEGIN = "[TOOL_CALLS]"
_NAME = re.compile(
    rf"\s{{0,8}}([\w.:/-]{{1,{MAX_NAME_LENGTH}}})(?:\[CALL_ID\]\w{{1,64}})?(?:\[ARGS\])?\s{{0,8}}(?=\{{)"
)
#: Longer than any match of _NAME.
_NAME_WINDOW = MAX_NAME_LENGTH + 100
_AFTER = re.compile(r"\s*(?:(,)|\])")


class Mistral(ToolFormat):
    markers = (_BEGIN, "[CALL_ID]", "[ARGS]")
    opening = _BEGIN
    # Mistral's templates refuse other ids.
    id_prefix, id_length = "", 9
    instruction = (
        'For function calls, return nothing but [TOOL_CALLS][{"name": <function name>, "arguments": '
        "<arguments as a JSON object>}], a list with one or several calls."
    )

    def parser(self) -> MistralParser:
        return MistralParser()

    def render(self, calls: Sequence[Call]) -> str:
        return f"{_BEGIN}[{', '.join(map(json_call, calls))}]"

    def grammar(self, tools: Sequence[Tool], notation: Notation, *, several: bool) -> str:
        more = ' (", " object)*' if several else ""
        lines = [f"calls: {notation.marker(_BEGIN)} tail", f'tail: "[" object{more} "]"']
        return "\n".join([*lines, object_rules(tools, notation)])


class MistralParser(JsonCallParser):
    opening = _BEGIN
    #: The name of the present call stands before the object, which has the arguments only.
    _is_named = False

    def _in_section(self, finished: bool) -> bool:
        """State before a list, an object or a name."""
        rest = self._buffer[self._opened :].lstrip()
        if not rest and not finished:
            return False
        self._state = super()._in_section if rest[:1] in ("[", "{") else self._at_name
        return True

    def _at_name(self, finished: bool) -> bool:
        name = _NAME.match(self._buffer, self._opened, self._opened + _NAME_WINDOW)
        if name is not None:
            self._is_named = True
            return self._begin(name[1], name.end(), self._in_arguments)
        if not finished and len(self._buffer) < self._opened + _NAME_WINDOW:
            return False
        return self._no_call()

    def _after_arguments(self, finished: bool) -> bool:
        if not self._is_named:
            return super()._after_arguments(finished)
        self._is_named = False
        return self._go(0, self._in_content)

    def _after_object(self, finished: bool) -> bool:
        after = _AFTER.match(self._buffer)
        if after is not None:
            return self._go(after.end(), super()._in_section if after[1] else self._in_content)
        if not finished and not self._buffer.strip():
            return False
        self._state = self._in_content
        return True
