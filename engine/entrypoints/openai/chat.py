"""/v1/chat/completions: conversation to prompt, generation to messages or stream chunks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ...common.errors import RequestError
from ...common.messages import Logprobs
from ...parsers.formats import HERMES
from .chat_parts import ParsedChoice, parsed_choices, reasoning_usage
from .events import Event
from .generation import NO_OUTPUT, Generation
from .keep_alive import KeepAlive
from .logprobs import chat_logprobs
from .output import Delta
from .protocol import ChatRequest
from .served_model import ServedModel
from .token_fields import prompt_logprobs_field, token_fields, token_names
from .tool_prompt import with_written_calls, with_written_tools

# Limits how many templates from requests are rendered at once, each in a process of its own.
_template_slots = threading.BoundedSemaphore(2)


def chat_prompts(
    served: ServedModel, request: ChatRequest, created: int, keep_alive: KeepAlive | None
) -> list[list[int]]:
    """Return the single prompt of this request, as token ids.

    Args:
        created: the time that a template may use, so that a resumed stream has the same prompt.
    """
    if request.prompt_token_ids is not None:
        prompt = request.prompt_token_ids
    elif request.disable_chat_template:
        text = request.messages[0]["content"]
        prompt = served.tokenizer.encode(text, add_special_tokens=request.add_special_tokens is not False)
    else:
        text = render_chat(
            served,
            request.messages,
            request.chat_template,
            request.chat_template_kwargs,
            created,
            keep_alive,
            continue_final_message=request.continue_final_message,
            tools=None if request.tool_use is None else request.tool_use.definitions,
        )
        prompt = served.tokenizer.encode(text, add_special_tokens=request.add_special_tokens or False)
    return [request.truncated(prompt + request.completion_token_ids, served.prompt_room(request.max_tokens))]


def render_chat(
    served: ServedModel,
    messages: list[dict[str, Any]],
    chat_template: str | None,
    arguments: dict[str, Any],
    created: int,
    keep_alive: KeepAlive | None,
    *,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Return a conversation as text.

    Args:
        chat_template: a client's template, which takes one of a few slots.
        arguments: further variables of the template.
        created: the time that the template may use.
        continue_final_message: end the text with the last message.
        tools: functions that the model may call.
    """
    messages, tools = _fitting(served, messages, tools, chat_template)
    with _template_slot(keep_alive) if chat_template else nullcontext():
        text = served.tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tools=tools, rendered_at=created, **arguments
        )
    return _up_to_end_of(messages[-1]["content"], text) if continue_final_message else text


def _fitting(
    served: ServedModel,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    chat_template: str | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return messages and tools as the template can show them: in variables of their own, or as text."""
    written_as = served.tool_format or HERMES
    has_calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
    if has_calls and not served.tokenizer.template_reads("tool_calls", chat_template):
        messages = with_written_calls(messages, written_as)
    if tools and not served.tokenizer.template_reads("tools", chat_template):
        return with_written_tools(messages, tools, written_as), None
    return messages, tools


def _up_to_end_of(message: str, text: str) -> str:
    """Return the text of a conversation without what the template has put after its last message."""
    begin = text.rfind(message.strip())
    if begin < 0:
        raise RequestError(
            "continue_final_message is true, but the chat template does not show the last message as it is",
            "continue_final_message",
        )
    # A template may keep or drop the white space at the end of a message.
    kept = message.lstrip()
    return text[:begin] + (kept if text.startswith(kept, begin) else message.strip())


@contextmanager
def _template_slot(keep_alive: KeepAlive | None) -> Iterator[None]:
    """Wait for a slot, with keep-alives, because many templates may be waiting."""
    if keep_alive is None:
        _template_slots.acquire()
    else:
        while not _template_slots.acquire(timeout=keep_alive.wait_seconds()):
            keep_alive.send_interim_response()
    try:
        yield
    finally:
        _template_slots.release()


def chat_completion(generation: Generation) -> dict[str, Any]:
    """Return the complete response."""
    parsed = parsed_choices(generation)
    deltas = generation.all_deltas()
    choices = [
        _choice(generation, index, parts, None if parsed is None else parsed[index])
        for index, parts in enumerate(deltas)
    ]
    return {
        **_head(generation, "chat.completion"),
        "choices": choices,
        "usage": generation.usage() | reasoning_usage(generation),
        "prompt_logprobs": choices[0]["prompt_logprobs"],
        "prompt_token_ids": generation.prompts[0] if generation.request.return_token_ids else None,
        "system_fingerprint": None,
        "service_tier": None,
    }


def chat_events(generation: Generation) -> Iterator[Event | None]:
    """Yield the events of OpenAI's stream: role, deltas, finish reason, and usage if requested."""
    head = _head(generation, "chat.completion.chunk")
    if generation.request.include_usage:
        head["usage"] = None
    parsed = parsed_choices(generation)
    started = set(generation.delivered)
    for index, delta in generation.deltas():
        if delta is NO_OUTPUT:
            yield None
            continue
        if index not in started:
            started.add(index)
            usage = generation.usage_so_far(index, has_begun=False)
            event = head | {"choices": [_role(generation, index)]} | usage
            if generation.request.return_token_ids:
                event["prompt_token_ids"] = generation.prompts[0]
            yield event, generation.mark(index)
        chunk = _chunk(generation, index, delta, None if parsed is None else parsed[index])
        event = head | {"choices": [chunk]} | generation.usage_so_far(index)
        yield event, generation.mark(index, delta)
    if generation.request.include_usage:
        yield head | {"choices": [], "usage": generation.usage() | reasoning_usage(generation)}, b""


def _head(generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.served.config.served_model_name,
    }


def _choice(
    generation: Generation, index: int, deltas: list[Delta], parsed: ParsedChoice | None
) -> dict[str, Any]:
    with_ids = generation.request.return_token_ids
    token_ids = [i for delta in deltas for i in delta.token_ids] if with_ids else None
    # As in FastDeploy and vLLM, what is absent is null.
    message = {
        "role": "assistant",
        "content": "".join(delta.text for delta in deltas),
        "refusal": None,
        "reasoning_content": None,
        "tool_calls": None,
        **token_fields(generation.served.tokenizer, generation.prompts[0] if with_ids else None, token_ids),
    }
    finish_reason: str | None = deltas[-1].finish_reason
    if parsed is not None:
        message |= parsed.message(parsed.push(message["content"], finish_reason))
        finish_reason = parsed.finish_reason(finish_reason)
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(generation, [entry for delta in deltas for entry in delta.logprobs]),
        "finish_reason": finish_reason,
        "stop_reason": deltas[-1].stop_reason,
        "token_ids": token_ids,
        "prompt_logprobs": prompt_logprobs_field(generation, index),
    }


def _role(generation: Generation, index: int) -> dict[str, Any]:
    delta: dict[str, Any] = {"role": "assistant", "content": ""}
    if generation.request.return_token_ids:
        delta |= token_fields(generation.served.tokenizer, generation.prompts[0], None)
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    if generation.request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs_field(generation, index)
    return choice


def _chunk(generation: Generation, index: int, delta: Delta, parsed: ParsedChoice | None) -> dict[str, Any]:
    body: dict[str, Any] = {"content": delta.text}
    finish_reason: str | None = delta.finish_reason
    if parsed is not None:
        body = {"content": ""} | parsed.delta(parsed.push(delta.text, finish_reason))
        finish_reason = parsed.finish_reason(finish_reason)
    choice = {
        "index": index,
        "delta": body,
        "logprobs": _logprobs(generation, delta.logprobs),
        "finish_reason": finish_reason,
    }
    if generation.request.return_token_ids:
        body |= token_fields(generation.served.tokenizer, None, delta.token_ids)
        choice["token_ids"] = delta.token_ids
    if delta.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    return choice


def _logprobs(
    generation: Generation, entries: tuple[Logprobs, ...] | list[Logprobs]
) -> dict[str, Any] | None:
    if generation.request.logprobs is None:
        return None
    return chat_logprobs(token_names(generation), entries)
