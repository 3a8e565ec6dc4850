"""Incremental search for the end of a JSON value."""

from __future__ import annotations

import re

_IN_STRING = re.compile(r'[^"\\]*')
_BETWEEN = re.compile(r"[\s0-9A-Za-z+\-.,:]*")


class JsonScan:
    """Position in a JSON text that arrives in pieces. It knows brackets and strings only.

    Args:
        depth: number of brackets that are open at the beginning.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._is_escaped = False
        #: The last open bracket has been closed.
        self.is_complete = False
        #: A character cannot be part of a JSON value.
        self.is_broken = False

    def advance(self, text: str, at: int) -> int:
        """Scan `text` from `at` on. Return where the scan stopped.

        This is behind the last bracket, at the character that is not JSON, or at the end of `text`.
        """
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _BETWEEN).match(text, at)
            assert found is not None, "the expressions match an empty text"
            at = found.end()
            if at == len(text):
                break
            character = text[at]
            if self._in_string:
                self._in_string = character != '"'
                self._is_escaped = character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self.is_complete = self._depth <= 0
            else:
                self.is_broken = True
                return at
            at += 1
            if self.is_complete:
                return at
        return at
