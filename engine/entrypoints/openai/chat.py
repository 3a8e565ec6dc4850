"""/v1/chat/completions: the conversation becomes a prompt, the answer becomes messages or chunks of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ...common.messages import Logprobs
from .answer import NOTHING, Answer
from .events import Event
from .logprobs import chat_logprobs
from .output import Delta
from .progress import Progress
from .protocol import ChatRequest
from .replica import Replica

# A client's own template is rendered in a process of its own; few at a time.
_foreign_templates = threading.BoundedSemaphore(2)


def chat_prompts(
    replica: Replica, request: ChatRequest, created: int, progress: Progress | None
) -> list[list[int]]:
    """The one prompt of this request, as token ids.

    A template may ask what time it is: `created`, because a stream that is resumed needs the same prompt.
    """
    with _place_for_foreign_template(progress) if request.chat_template else nullcontext():
        text = replica.tokenizer.apply_chat_template(
            request.messages,
            chat_template=request.chat_template,
            rendered_at=created,
            **request.chat_template_kwargs,
        )
    return [replica.tokenizer.encode(text)]


@contextmanager
def _place_for_foreign_template(progress: Progress | None) -> Iterator[None]:
    """Others may be many, and nobody is to take the replica for dead over them."""
    if progress is None:
        _foreign_templates.acquire()
    else:
        while not _foreign_templates.acquire(timeout=progress.patience()):
            progress.send_interim_head()
    try:
        yield
    finally:
        _foreign_templates.release()


def chat_completion(answer: Answer) -> dict[str, Any]:
    """The whole answer at once."""
    deltas = answer.whole()
    return {
        **_head(answer, "chat.completion"),
        "choices": [_choice(answer, index, parts) for index, parts in enumerate(deltas)],
        "usage": answer.usage(),
    }


def chat_events(answer: Answer) -> Iterator[Event | None]:
    """The answer in the order of OpenAI's stream: role, deltas, finish reason, usage if it was asked for."""
    head = _head(answer, "chat.completion.chunk")
    if answer.request.include_usage:
        head["usage"] = None
    started = set(answer.sent)
    for index, delta in answer.deltas():
        if delta is NOTHING:
            yield None
            continue
        if index not in started:
            started.add(index)
            usage = answer.usage_so_far(index, has_begun=False)
            yield head | {"choices": [_role(answer, index)]} | usage, answer.mark(index)
        event = head | {"choices": [_chunk(answer, index, delta)]} | answer.usage_so_far(index)
        yield event, answer.mark(index, delta)
    if answer.request.include_usage:
        yield head | {"choices": [], "usage": answer.usage()}, b""


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": answer.replica.config.served_model_name,
    }


def _choice(answer: Answer, index: int, deltas: list[Delta]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(delta.text for delta in deltas)}
    if answer.request.return_token_ids:
        message["prompt_token_ids"] = answer.prompts[0]
        message["completion_token_ids"] = [i for delta in deltas for i in delta.token_ids]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(answer, [entry for delta in deltas for entry in delta.logprobs]),
        "finish_reason": deltas[-1].finish_reason,
    }


def _role(answer: Answer, index: int) -> dict[str, Any]:
    delta: dict[str, Any] = {"role": "assistant", "content": ""}
    if answer.request.return_token_ids:
        delta["prompt_token_ids"] = answer.prompts[0]
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _chunk(answer: Answer, index: int, delta: Delta) -> dict[str, Any]:
    body: dict[str, Any] = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
    if answer.request.return_token_ids:
        body["completion_token_ids"] = list(delta.token_ids)
    return {
        "index": index,
        "delta": body,
        "logprobs": _logprobs(answer, delta.logprobs),
        "finish_reason": delta.finish_reason,
    }


def _logprobs(answer: Answer, entries: tuple[Logprobs, ...] | list[Logprobs]) -> dict[str, Any] | None:
    if answer.request.logprobs is None:
        return None
    return chat_logprobs(answer.replica.tokenizer, entries)
