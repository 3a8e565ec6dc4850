"""State machine that finds tool calls in a growing text; the base of the parsers of all formats.

What a parser has returned depends on the text so far, not on how it was cut into pieces. A resumed response
therefore continues where it was interrupted, once the parser has got the text so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from .json_scan import JsonScan
from .parts import CallArguments, CallBegin, CallEnd, Content, Part

#: Longer names are not taken for a call.
MAX_NAME_LENGTH = 256


class ToolParser(ABC):
    """Parser of one choice.

    A state is a method. It looks at the buffer, which begins with the first character that is not in a part
    yet, and returns True if the buffer or the state has changed, or False if it needs more text.
    """

    #: Text at which a section with calls begins.
    opening = ""
    #: Text at which arguments end that are not JSON; empty if there is none.
    closing = ""

    def __init__(self) -> None:
        self._state: Callable[[bool], bool] = self._start
        self._buffer = ""
        self._parts: list[Part] = []
        self._has_open_call = False
        self._scan = JsonScan()
        #: Length of the beginning of the buffer that becomes content if no call follows.
        self._opened = 0
        #: Number of calls so far.
        self.num_calls = 0

    def push(self, text: str, finished: bool = False) -> list[Part]:
        """Add text; return what is decided by now. Nothing is left undecided once the text is `finished`."""
        self._buffer += text
        while self._state(finished):
            pass
        if finished:
            self._end()
        parts, self._parts = self._parts, []
        return parts

    def _start(self, finished: bool) -> bool:
        """First state."""
        self._state = self._in_content
        return True

    @abstractmethod
    def _in_section(self, finished: bool) -> bool:
        """State behind the opening text."""

    def _after_arguments(self, finished: bool) -> bool:
        """State behind the arguments of a call."""
        self._state = self._in_content
        return True

    def _in_content(self, finished: bool) -> bool:
        """State that looks for the opening text. White space beside calls is layout, and left out."""
        found = self._buffer.find(self.opening)
        if found >= 0:
            content = self._buffer[:found].rstrip()
            self._content(len(content))
            self._opened = found - len(content) + len(self.opening)
            self._state = self._in_section
            return True
        if finished:
            if self.num_calls:
                self._buffer = self._buffer.rstrip()
            self._content(len(self._buffer))
        else:
            shown = self._buffer[: len(self._buffer) - begun_length(self._buffer, self.opening)]
            self._content(len(shown.rstrip()))
        return False

    def _no_call(self) -> bool:
        """Go back to content, because what looked like a call is none."""
        self._content(self._opened)
        self._opened = 0
        self._state = self._in_content
        return True

    def _in_arguments(self, finished: bool) -> bool:
        """State within arguments, which begin with a bracket."""
        end = self._scan.advance(self._buffer, 0)
        self._arguments(end)
        if self._scan.is_complete:
            self._end()
            self._state = self._after_arguments
        elif self._scan.is_broken:
            self._state = self._in_broken_arguments
        else:
            return False
        return True

    def _in_broken_arguments(self, finished: bool) -> bool:
        """State within arguments that are not JSON; the client gets them as they are."""
        end = self._buffer.find(self.closing) if self.closing else -1
        if end >= 0:
            self._arguments(end)
            self._state = self._after_arguments
            return True
        held = 0 if finished else begun_length(self._buffer, self.closing)
        self._arguments(len(self._buffer) - held)
        return False

    def _begin(self, name: str, end: int, state: Callable[[bool], bool]) -> bool:
        """Begin a call and continue behind `end` in `state`."""
        self._end()
        self._parts.append(CallBegin(self.num_calls, name))
        self.num_calls += 1
        self._has_open_call = True
        self._scan = JsonScan()
        return self._go(end, state)

    def _go(self, end: int, state: Callable[[bool], bool]) -> bool:
        """Drop the buffer up to `end` and continue in `state`."""
        self._buffer = self._buffer[end:]
        self._opened = 0
        self._state = state
        return True

    def _end(self) -> None:
        if self._has_open_call:
            self._parts.append(CallEnd(self.num_calls - 1))
            self._has_open_call = False

    def _arguments(self, length: int) -> None:
        self._add_arguments(self._buffer[:length])
        self._buffer = self._buffer[length:]

    def _add_arguments(self, text: str) -> None:
        if text:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def _content(self, length: int) -> None:
        if length:
            self._end()
            self._parts.append(Content(self._buffer[:length]))
            self._buffer = self._buffer[length:]


def begun_length(text: str, word: str) -> int:
    """Return the length of the longest end of `text` that begins `word`."""
    start = max(len(text) - len(word) + 1, 0)
    while word and (start := text.find(word[0], start)) >= 0:
        if word.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def may_begin(text: str, *words: str) -> bool:
    """Return True if `text` is shorter than one of `words` and begins it."""
    return any(len(text) < len(word) and word.startswith(text) for word in words)
