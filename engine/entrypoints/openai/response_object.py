"""/v1/responses: a generation as a response object or as its stream of events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ...common.request import FinishReason
from ...parsers.parts import Content, Part
from .chat import chat_prompts
from .chat_parts import call_id, reasoning_usage
from .errors import ApiError
from .events import Event
from .generation import NO_OUTPUT, Generation
from .keep_alive import KeepAlive
from .logprobs import chat_logprobs
from .output import Delta
from .output_parsing import message_parser, tool_format_of
from .response_bodies import ResponsesBody
from .response_input import ResponsesRequest, without_oldest
from .response_output import ResponseOutput
from .served_model import ServedModel
from .token_fields import token_names
from .validation import without_nulls

#: Finish reason -> type of the last event, status of the response, and status of its last item.
_ENDS = {
    FinishReason.STOP: ("response.completed", "completed", "completed"),
    FinishReason.LENGTH: ("response.incomplete", "incomplete", "incomplete"),
    FinishReason.ABORT: ("response.failed", "cancelled", "incomplete"),
}


def response_prompts(
    served: ServedModel,
    body: ResponsesBody,
    request: ResponsesRequest,
    created: int,
    keep_alive: KeepAlive | None,
) -> list[list[int]]:
    """Return the single prompt; without the oldest messages if the client allows that and it is too long."""
    prompts = chat_prompts(served, request, created, keep_alive)
    room = served.prompt_room(request.max_tokens)
    if body.truncation != "auto" or len(prompts[0]) <= room:
        return prompts

    def fits(shorter: ResponsesRequest) -> bool:
        return len(chat_prompts(served, shorter, created, keep_alive)[0]) <= room

    return chat_prompts(served, without_oldest(request, fits), created, keep_alive)


def response_object(generation: Generation, body: ResponsesBody) -> dict[str, Any]:
    """Return the complete response."""
    progress = _Progress(generation, body)
    [deltas] = generation.all_deltas()
    for delta in deltas:
        progress.add(delta)
    return progress.response


def response_events(generation: Generation, body: ResponsesBody) -> Iterator[Event | None]:
    """Yield the events of OpenAI's stream from the first that no other replica has sent.

    Several events may stand for one delta. Only the last of them has the tokens in its mark, so that a
    replica that resumes the stream between them draws the tokens again.
    """
    progress = _Progress(generation, body)
    for delta in generation.steps[0]:
        progress.add(delta)
    num_sent = generation.num_sent_events
    if progress.num_events > num_sent:
        raise ApiError(
            409,
            f"this response cannot be resumed here: its tokens make {progress.num_events} events, and "
            f"{num_sent} were sent",
        )
    for _, delta in generation.deltas():
        events = [] if delta is NO_OUTPUT else progress.add(delta)
        marks = [*(generation.mark(0) for _ in events[1:]), *(generation.mark(0, delta) for _ in events[:1])]
        new = [pair for pair in zip(events, marks, strict=True) if pair[0]["sequence_number"] >= num_sent]
        if new:
            yield from new
        elif delta is NO_OUTPUT or generation.wants_keep_alives:
            yield None


class _Progress:
    """The response so far."""

    def __init__(self, generation: Generation, body: ResponsesBody) -> None:
        self._generation = generation
        served, request, prompt = generation.served, generation.request, generation.prompts[0]
        assert isinstance(request, ResponsesRequest), "the request has been read as one"
        self._parser = message_parser(served, request, prompt)
        tool_format = tool_format_of(served, request)

        def id_of_call(number: int) -> str:
            assert tool_format is not None, "only a tool parser finds calls"
            return call_id(tool_format, generation.id, 0, number)

        self._output = ResponseOutput(generation.id.removeprefix("resp_"), id_of_call)
        self.response = _begun(generation, body)
        self.num_events = 0

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """Add a delta; return its events with their numbers."""
        events = []
        if self.num_events == 0:
            begun = dict(self.response)
            events += [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")]
        events += self._output.add(self._parts(delta), self._logprobs(delta))
        if delta.finish_reason is not None:
            events += self._finish(delta.finish_reason)
        numbered = [
            {"type": event["type"], "sequence_number": number, **event}
            for number, event in enumerate(events, self.num_events)
        ]
        self.num_events += len(events)
        return numbered

    def _parts(self, delta: Delta) -> list[Part]:
        if self._parser is not None:
            return self._parser.push(delta.text, delta.finish_reason is not None)
        return [Content(delta.text)] if delta.text else []

    def _finish(self, reason: FinishReason) -> list[dict[str, Any]]:
        kind, status, item_status = _ENDS[reason]
        events = self._output.finish(item_status)
        self.response |= {
            "status": status,
            "output": self._output.items,
            "usage": _usage(self._generation.usage() | reasoning_usage(self._generation)),
        }
        if reason is FinishReason.LENGTH:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        if reason is FinishReason.ABORT:
            self.response["error"] = {"code": "server_error", "message": "the request was aborted"}
        return [*events, {"type": kind, "response": self.response}]

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        if self._generation.request.logprobs is None:
            return []
        names = token_names(self._generation)
        content: list[dict[str, Any]] = chat_logprobs(names, delta.logprobs)["content"]
        return content


def _begun(generation: Generation, body: ResponsesBody) -> dict[str, Any]:
    """Return the response before its first token."""
    request = generation.request
    return {
        "id": generation.id,
        "object": "response",
        "created_at": generation.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": generation.served.config.served_model_name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "store": False,
        "temperature": request.temperature,
        "text": {"format": _given(body.text and body.text.format) or {"type": "text"}},
        "tool_choice": _given(body.tool_choice) or "auto",
        "tools": [tool | {"strict": tool.get("strict", False)} for tool in _given(body.tools) or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _given(value: Any) -> Any:
    """Return a part of the request as it was sent, without what is null in it."""
    return without_nulls(msgspec.to_builtins(value))


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Return the usage of a chat with this endpoint's names."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
