"""Parsed output in OpenAI's formats: a message with tool calls and reasoning, and the deltas of a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from ...parsers.message import MessageParser
from ...parsers.parts import CallArguments, CallBegin, Content, Part, Reasoning
from ...parsers.tool_format import ToolFormat
from .generation import Generation
from .output_parsing import message_parser, reasoning_splitter, shown_ids, tool_format_of
from .protocol import ChatRequest


class ParsedChoice:
    """Parser of one choice of a chat, which continues after what another replica has sent."""

    def __init__(
        self, generation: Generation, request: ChatRequest, index: int, parser: MessageParser
    ) -> None:
        self._parser = parser
        self._response_id = generation.id
        self._index = index
        self._format = tool_format_of(generation.served, request)
        self._hides_reasoning = not request.include_reasoning

    def push(self, text: str, finish_reason: str | None = None) -> list[Part]:
        """Add text of the choice; return the parts for the client."""
        parts = self._parser.push(text, finish_reason is not None)
        if self._hides_reasoning:
            parts = [part for part in parts if not isinstance(part, Reasoning)]
        return parts

    def finish_reason(self, reason: str | None) -> str | None:
        """Return the finish reason for the client."""
        return "tool_calls" if reason == "stop" and self._parser.has_calls else reason

    def delta(self, parts: Iterable[Part]) -> dict[str, Any]:
        """Return the delta of one event. It has at most one entry for each call."""
        delta: dict[str, Any] = {}
        for part in parts:
            match part:
                case Reasoning(text):
                    delta["reasoning_content"] = delta.get("reasoning_content", "") + text
                case Content(text):
                    delta["content"] = delta.get("content", "") + text
                case CallBegin(index, name):
                    delta.setdefault("tool_calls", []).append(
                        {
                            "index": index,
                            "id": self._call_id(index),
                            "type": "function",
                            "function": {"name": name, "arguments": ""},
                        }
                    )
                case CallArguments(index, text):
                    calls = delta.setdefault("tool_calls", [])
                    if not calls or calls[-1]["index"] != index:
                        calls.append({"index": index, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += text
        return delta

    def message(self, parts: Iterable[Part]) -> dict[str, Any]:
        """Return the whole message."""
        whole = self.delta(parts)
        calls = [
            {key: call[key] for key in ("id", "type", "function")} for call in whole.get("tool_calls", ())
        ]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": whole.get("content", None if calls else ""),
        }
        if "reasoning_content" in whole:
            message["reasoning_content"] = whole["reasoning_content"]
        return message | ({"tool_calls": calls} if calls else {})

    def _call_id(self, number: int) -> str:
        """Return the id of a call. It is not random, because a resumed response has the same one."""
        assert self._format is not None, "only a tool parser finds calls"
        return call_id(self._format, self._response_id, self._index, number)


def parsed_choices(generation: Generation) -> list[ParsedChoice] | None:
    """Return the parsers of the choices; None if their text is their content."""
    served, request, prompt = generation.served, generation.request, generation.prompts[0]
    choices = []
    for index in range(request.n):
        parser = message_parser(served, request, prompt)
        if parser is None or not isinstance(request, ChatRequest):
            return None
        choices.append(ParsedChoice(generation, request, index, parser))
    if request.stream:
        for index, delta in generation.delivered.items():
            choices[index].push(delta.text)
    return choices


def call_id(tool_format: ToolFormat, response_id: str, choice: int, number: int) -> str:
    """Return the id of a choice's call number `number`."""
    digest = hashlib.sha256(f"{response_id}/{choice}/{number}".encode()).hexdigest()
    return tool_format.id_prefix + digest[: tool_format.id_length]


def reasoning_usage(generation: Generation) -> dict[str, Any]:
    """Return the number of reasoning tokens for the field `usage`; empty if reasoning is not separated."""
    served, request, prompt = generation.served, generation.request, generation.prompts[0]
    if served.reasoning_format is None or reasoning_splitter(served, request, prompt) is None:
        return {}
    total = sum(_num_reasoning(generation, generation.token_ids(index)) for index in range(request.n))
    return {"completion_tokens_details": {"reasoning_tokens": total}}


def _num_reasoning(generation: Generation, token_ids: list[int]) -> int:
    served, request = generation.served, generation.request
    splitter = reasoning_splitter(served, request, generation.prompts[0])
    assert splitter is not None
    detokenizer = served.tokenizer.detokenizer(
        request.skip_special_tokens, continues=request.continues_prompt, shown_ids=shown_ids(served, request)
    )
    count = 0
    for token_id in token_ids:
        splitter.push(detokenizer.push((token_id,)))
        count += 1
        if not splitter.is_inside:
            break
    return count if splitter.has_reasoning else 0
