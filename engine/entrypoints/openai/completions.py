"""/v1/completions: plain continuation of one or several prompts, in OpenAI's older shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...common.errors import RequestError
from ...common.messages import Logprobs
from .answer import NOTHING, Answer
from .events import Event
from .logprobs import completion_logprobs, joined, prompt_logprobs
from .output import Delta
from .protocol import CompletionRequest
from .replica import Replica

#: Limits of the log probabilities of all prompts in one answer, and of one prompt in a stream, which sends
#: them in one event. Those of the most likely tokens in each place count as well.
_MOST_IN_AN_ANSWER, _MOST_IN_AN_EVENT = 1 << 20, 1 << 15


def completion_prompts(replica: Replica, request: CompletionRequest) -> list[list[int]]:
    """Return the prompts as token ids.

    Raises:
        RequestError: the answer would hold too many log probabilities of prompts.
    """
    prompts = [
        replica.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        for prompt in request.prompts
    ]
    if request.prompt_logprobs is not None:
        _check_size(prompts, request, request.prompt_logprobs)
    return prompts


def completion(answer: Answer, request: CompletionRequest) -> dict[str, Any]:
    """The whole answer at once."""
    deltas = answer.whole()
    return {
        **_head(answer),
        "choices": [_choice(answer, request, index, parts) for index, parts in enumerate(deltas)],
        "usage": answer.usage(),
    }


def completion_events(answer: Answer, request: CompletionRequest) -> Iterator[Event | None]:
    """The answer as it comes; with `echo` a choice begins with its prompt."""
    head = _head(answer)
    if request.include_usage:
        head["usage"] = None
    #: Where the next token of each choice begins. Not what was sent: a token's text may be held back, for
    #: a stop string or for the rest of a character.
    offsets = {
        index: len(_scored_echo(answer, request, index)) + _length(answer, delta)
        for index, delta in answer.sent.items()
    }
    for index, delta in answer.deltas():
        if delta is NOTHING:
            yield None
            continue
        if index not in offsets:
            offsets[index] = len(_scored_echo(answer, request, index))
            echo = _echo(answer, request, index)
            # A prompt of special tokens has log probabilities but no text.
            if echo or request.return_token_ids or request.prompt_logprobs is not None:
                first = _first_chunk(answer, request, index, echo)
                usage = answer.usage_so_far(index, has_begun=False)
                yield head | {"choices": [first]} | usage, answer.mark(index)
        chunk = _chunk(answer, request, index, delta, offsets[index])
        if chunk["logprobs"] is not None:
            offsets[index] += sum(map(len, chunk["logprobs"]["tokens"]))
        yield head | {"choices": [chunk]} | answer.usage_so_far(index), answer.mark(index, delta)
    if request.include_usage:
        yield head | {"choices": [], "usage": answer.usage()}, b""


def _head(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": "text_completion",
        "created": answer.created,
        "model": answer.replica.config.served_model_name,
    }


def _echo(answer: Answer, request: CompletionRequest, index: int) -> str:
    if not request.echo:
        return ""
    number = index // request.n
    prompt = request.prompts[number]
    return prompt if isinstance(prompt, str) else answer.replica.tokenizer.decode(prompt)


def _scored_echo(answer: Answer, request: CompletionRequest, index: int) -> str:
    """Return the prompt of a choice if its log probabilities begin with those of the prompt, else ""."""
    return "" if request.prompt_logprobs is None else _echo(answer, request, index)


def _echoed_logprobs(
    answer: Answer, request: CompletionRequest, index: int, echo: str
) -> dict[str, Any] | None:
    if request.prompt_logprobs is None:
        return None
    prompt = answer.prompts[index // request.n]
    return prompt_logprobs(answer.replica.tokenizer, prompt, answer.prompt_logprobs(index), echo)


def _check_size(prompts: list[list[int]], request: CompletionRequest, logprobs: int) -> None:
    each = 1 + logprobs
    longest, total = max(map(len, prompts)) * each, sum(map(len, prompts)) * request.n * each
    most, size = (_MOST_IN_AN_EVENT, longest) if request.stream else (_MOST_IN_AN_ANSWER, total)
    if size > most:
        where = "one event of a stream" if request.stream else "one answer"
        raise RequestError(
            f"echo with logprobs would put {size} log probabilities of prompts into {where}; the limit is "
            f"{most}: request fewer logprobs or prompts" + (", or no stream" * request.stream),
            "echo",
        )


def _length(answer: Answer, delta: Delta) -> int:
    """Characters of its tokens."""
    return sum(len(answer.replica.tokenizer.token_text(token_id)) for token_id in delta.token_ids)


def _choice(answer: Answer, request: CompletionRequest, index: int, deltas: list[Delta]) -> dict[str, Any]:
    echo = _echo(answer, request, index)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    start = len(_scored_echo(answer, request, index))
    choice = {
        "index": index,
        "text": echo + "".join(delta.text for delta in deltas),
        "logprobs": joined(_echoed_logprobs(answer, request, index, echo), _logprobs(answer, entries, start)),
        "finish_reason": deltas[-1].finish_reason,
    }
    if request.return_token_ids:
        choice["prompt_token_ids"] = answer.prompts[index // request.n]
        choice["completion_token_ids"] = [i for delta in deltas for i in delta.token_ids]
    return choice


def _first_chunk(answer: Answer, request: CompletionRequest, index: int, echo: str) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": echo,
        "logprobs": _echoed_logprobs(answer, request, index, echo),
        "finish_reason": None,
    }
    if request.return_token_ids:
        choice["prompt_token_ids"] = answer.prompts[index // request.n]
    return choice


def _chunk(
    answer: Answer, request: CompletionRequest, index: int, delta: Delta, offset: int
) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": delta.text,
        "logprobs": _logprobs(answer, delta.logprobs, offset),
        "finish_reason": delta.finish_reason,
    }
    if request.return_token_ids:
        choice["completion_token_ids"] = list(delta.token_ids)
    return choice


def _logprobs(
    answer: Answer, entries: tuple[Logprobs, ...] | list[Logprobs], offset: int
) -> dict[str, Any] | None:
    if answer.request.logprobs is None:
        return None
    return completion_logprobs(answer.replica.tokenizer, entries, offset)
