"""Calls that are JSON objects with the name and the arguments of the function."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from typing import Any

from .json_scan import JsonScan
from .json_text import json_text, without_surrogates
from .parts import Call
from .tool_parser import MAX_NAME_LENGTH, ToolParser

_BEGIN = re.compile(r"\s*(?:\[\s*)?\{")
_MAY_BEGIN = re.compile(r"\s*(?:\[\s*)?")
#: Once the key of the arguments has begun, the object is a call.
_HEAD = re.compile(
    rf'\{{\s*"name"\s*:\s*"([^"\\\x00-\x1f]{{1,{MAX_NAME_LENGTH}}})"\s*,\s*"(?:arguments|parameters)'
)
_COLON = re.compile(r'"\s*:\s*(?=\S)')
_MAY_BE_COLON = re.compile(r'(?:"\s*(?::\s*)?)?')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class JsonCallParser(ToolParser):
    """Parser of objects, single or in a list."""

    #: An object without arguments is no call.
    needs_arguments = False

    def _in_section(self, finished: bool) -> bool:
        begin = _BEGIN.match(self._buffer, self._opened)
        if begin is not None:
            self._object = self._scanned = begin.end() - 1
            self._scan = JsonScan()
            self._state = self._in_object
            return True
        if not finished and _MAY_BEGIN.fullmatch(self._buffer, self._opened):
            return False
        return self._no_call()

    def _in_object(self, finished: bool) -> bool:
        """State before the arguments of an object; without any, the whole object decides."""
        head = _HEAD.match(self._buffer, self._object)
        if head is not None:
            return self._begin(head[1], head.end(), self._at_colon)
        self._scanned = self._scan.advance(self._buffer, self._scanned)
        if self._scan.is_complete:
            call = self._call_of(self._buffer[self._object : self._scanned])
            if call is None:
                return self._no_call()
            self._begin(call.name, self._scanned, self._after_object)
            self._add_arguments(call.arguments)
            return True
        return self._no_call() if self._scan.is_broken or finished else False

    def _at_colon(self, finished: bool) -> bool:
        colon = _COLON.match(self._buffer)
        if colon is not None:
            return self._go(colon.end(), self._at_value)
        if _MAY_BE_COLON.fullmatch(self._buffer):
            return self._go(len(self._buffer), self._in_broken_arguments) if finished else False
        self._state = self._in_broken_arguments
        return True

    def _at_value(self, finished: bool) -> bool:
        if self._buffer[0] in "{[":
            self._state = self._in_arguments
            return True
        if self._buffer.startswith("null"):
            self._add_arguments("{}")
            return self._go(4, self._after_arguments)
        string = _STRING.match(self._buffer)
        if string is not None:
            # Some models write the arguments as a string of JSON.
            try:
                self._add_arguments(without_surrogates(json.loads(string[0], strict=False)))
            except ValueError:
                self._add_arguments(string[0])
            return self._go(string.end(), self._after_arguments)
        if not finished and (self._buffer[0] == '"' or "null".startswith(self._buffer)):
            return False
        self._state = self._in_broken_arguments
        return True

    def _after_arguments(self, finished: bool) -> bool:
        self._scan = JsonScan(depth=1)
        self._state = self._in_rest_of_object
        return True

    def _in_rest_of_object(self, finished: bool) -> bool:
        self._go(self._scan.advance(self._buffer, 0), self._state)
        if not self._scan.is_complete and not self._scan.is_broken:
            return False
        self._state = self._after_object
        return True

    @abstractmethod
    def _after_object(self, finished: bool) -> bool:
        """State behind an object."""

    def _call_of(self, text: str) -> Call | None:
        try:
            value = json.loads(text, strict=False)
            name = value.get("name") if isinstance(value, dict) else None
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
                return None
            key = next((key for key in ("arguments", "parameters") if key in value), None)
            if key is None:
                return None if self.needs_arguments else Call(name, "{}")
            return Call(name, _as_text(value[key]))
        except (ValueError, RecursionError):
            return None


def _as_text(arguments: Any) -> str:
    if isinstance(arguments, str):
        return without_surrogates(arguments)
    return json_text({} if arguments is None else arguments)
