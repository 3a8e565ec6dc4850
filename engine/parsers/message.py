"""Parser of a choice's whole text: reasoning, then content and tool calls."""

from __future__ import annotations

from .parts import Content, Part, Reasoning
from .reasoning import ReasoningSplitter
from .tool_parser import ToolParser


class MessageParser:
    """Splitter and tool parser in a row; either may be missing."""

    def __init__(self, splitter: ReasoningSplitter | None, tools: ToolParser | None) -> None:
        self._splitter = splitter
        self._tools = tools

    @property
    def has_calls(self) -> bool:
        return self._tools is not None and self._tools.num_calls > 0

    def push(self, text: str, finished: bool = False) -> list[Part]:
        """Add text; return the parts that are decided by now."""
        parts: list[Part] = []
        if self._splitter is not None:
            reasoning, text = self._splitter.push(text, finished)
            if reasoning:
                parts.append(Reasoning(reasoning))
        if self._tools is not None:
            return parts + self._tools.push(text, finished)
        return [*parts, Content(text)] if text else parts
