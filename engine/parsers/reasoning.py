"""Separation of reasoning, `<think>...</think>`, from the rest of a growing text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .tool_parser import begun_length, may_begin

BEGIN, END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models writes what follows its reasoning."""

    #: The content is between these tags.
    wrapper: tuple[str, str] | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens that the splitter needs to see in the text."""
        return (BEGIN, END, *(self.wrapper or ()))


class ReasoningSplitter:
    """Splitter of one choice; what it has returned depends on the text so far, not on its pieces.

    Args:
        is_inside: the prompt ends within the reasoning.
        in_one_piece: return the reasoning once it is complete.
    """

    def __init__(
        self, format_: ReasoningFormat, *, is_inside: bool = False, in_one_piece: bool = False
    ) -> None:
        self._wrapper = format_.wrapper
        self._in_one_piece = in_one_piece
        self._state: Callable[[bool], bool] = self._at_reasoning if is_inside else self._start
        #: The text has reasoning, complete or not.
        self.has_reasoning = is_inside
        self._buffer = ""
        self._reasoning = ""
        self._content = ""

    @property
    def is_inside(self) -> bool:
        """True while the reasoning has not ended."""
        return self._state in (self._start, self._at_reasoning, self._in_reasoning)

    def push(self, text: str, finished: bool = False) -> tuple[str, str]:
        """Add text; return new reasoning and new content."""
        self._buffer += text
        while self._state(finished):
            pass
        reasoning, content = self._reasoning, self._content
        self._reasoning = self._content = ""
        return reasoning, content

    def _start(self, finished: bool) -> bool:
        rest = self._buffer.lstrip()
        if rest.startswith(BEGIN):
            self.has_reasoning = True
            return self._go(rest[len(BEGIN) :], self._at_reasoning)
        if not finished and (not rest or may_begin(rest, BEGIN)):
            return False
        self._state = self._in_content
        return True

    def _at_reasoning(self, finished: bool) -> bool:
        """State before the first character of the reasoning; white space around it is layout."""
        rest = self._buffer.lstrip()
        return self._go(rest, self._in_reasoning) if rest else False

    def _in_reasoning(self, finished: bool) -> bool:
        if self._in_one_piece and not finished and END not in self._buffer:
            return False
        text, has_ended = self._take_until(END, finished)
        self._reasoning += text
        return has_ended and self._go(self._buffer, self._before_content)

    def _before_content(self, finished: bool) -> bool:
        rest = self._buffer.lstrip()
        if not rest:
            return False
        if self._wrapper is None:
            return self._go(rest, self._in_content)
        if rest.startswith(self._wrapper[0]):
            return self._go(rest[len(self._wrapper[0]) :], self._at_wrapped)
        if not finished and may_begin(rest, self._wrapper[0]):
            return False
        return self._go(rest, self._in_content)

    def _at_wrapped(self, finished: bool) -> bool:
        rest = self._buffer.lstrip()
        return self._go(rest, self._in_wrapped) if rest else False

    def _in_wrapped(self, finished: bool) -> bool:
        assert self._wrapper is not None, "the state belongs to a wrapper"
        text, has_ended = self._take_until(self._wrapper[1], finished)
        self._content += text
        return has_ended and self._go(self._buffer, self._in_content)

    def _in_content(self, finished: bool) -> bool:
        self._content += self._buffer
        self._buffer = ""
        return False

    def _take_until(self, tag: str, finished: bool) -> tuple[str, bool]:
        """Take from the buffer what stands before a tag, and the tag itself.

        Returns:
            The text without white space before the tag, which is layout, and True if the tag was found.
            What may be layout or the beginning of the tag stays in the buffer until that is decided.
        """
        text, found, rest = self._buffer.partition(tag)
        if found:
            self._buffer = rest
            return text.rstrip(), True
        length = len(text)
        if not finished:
            length = len(text[: length - begun_length(text, tag)].rstrip())
        self._buffer = text[length:]
        return text[:length], False

    def _go(self, buffer: str, state: Callable[[bool], bool]) -> bool:
        self._buffer = buffer
        self._state = state
        return True
