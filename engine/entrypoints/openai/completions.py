"""/v1/completions: continuation of one or several prompts, in OpenAI's older format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...common.messages import Logprobs
from .events import Event
from .generation import NO_OUTPUT, Generation
from .logprobs import completion_logprobs, echoed_logprobs, joined
from .output import Delta
from .protocol import CompletionRequest
from .served_model import ServedModel
from .token_fields import prompt_logprobs_field, token_fields, token_names


def completion_prompts(served: ServedModel, request: CompletionRequest) -> list[list[int]]:
    """Return the prompts as token ids."""
    special = request.add_special_tokens is not False
    room = served.prompt_room(request.max_tokens)
    return [
        request.truncated(
            served.tokenizer.encode(prompt, add_special_tokens=special)
            if isinstance(prompt, str)
            else prompt,
            room,
        )
        for prompt in request.prompts
    ]


def completion(generation: Generation, request: CompletionRequest) -> dict[str, Any]:
    """Return the complete response."""
    deltas = generation.all_deltas()
    return {
        **_head(generation),
        "choices": [_choice(generation, request, index, parts) for index, parts in enumerate(deltas)],
        "usage": generation.usage(),
    }


def completion_events(generation: Generation, request: CompletionRequest) -> Iterator[Event | None]:
    """Yield the events of the stream; with `echo` a choice begins with its prompt."""
    head = _head(generation)
    if request.include_usage:
        head["usage"] = None
    # Text offset of the next token of each choice. It exceeds the length of the text sent so far while text
    # is withheld, because it may begin a stop string or a character is incomplete.
    offsets = {
        index: len(_scored_echo(generation, request, index)) + _length(generation, delta)
        for index, delta in generation.delivered.items()
    }
    for index, delta in generation.deltas():
        if delta is NO_OUTPUT:
            yield None
            continue
        if index not in offsets:
            offsets[index] = len(_scored_echo(generation, request, index))
            echo = _echo(generation, request, index)
            # A prompt of special tokens has log probabilities but no text.
            if echo or request.return_token_ids or request.scored_logprobs is not None:
                first = _first_chunk(generation, request, index, echo)
                usage = generation.usage_so_far(index, has_begun=False)
                yield head | {"choices": [first]} | usage, generation.mark(index)
        chunk = _chunk(generation, request, index, delta, offsets[index])
        if chunk["logprobs"] is not None:
            offsets[index] += _length(generation, delta)
        yield head | {"choices": [chunk]} | generation.usage_so_far(index), generation.mark(index, delta)
    if request.include_usage:
        yield head | {"choices": [], "usage": generation.usage()}, b""


def _head(generation: Generation) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created,
        "model": generation.served.config.served_model_name,
    }


def _echo(generation: Generation, request: CompletionRequest, index: int) -> str:
    if not request.echo:
        return ""
    number = index // request.n
    prompt = request.prompts[number]
    if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
        return prompt
    return generation.served.tokenizer.decode(generation.prompts[number], request.skip_special_tokens)


def _scored_echo(generation: Generation, request: CompletionRequest, index: int) -> str:
    """Return the prompt of a choice if its log probabilities begin with those of the prompt, else ""."""
    return _echo(generation, request, index) if request.echoes_logprobs else ""


def _echoed_logprobs(
    generation: Generation, request: CompletionRequest, index: int, echo: str
) -> dict[str, Any] | None:
    if request.logprobs is None or not request.echoes_logprobs:
        return None
    prompt, entries = generation.prompts[index // request.n], generation.prompt_logprobs(index)
    return echoed_logprobs(token_names(generation), prompt, entries, request.logprobs, echo)


def _length(generation: Generation, delta: Delta) -> int:
    """Return the number of characters of the delta's tokens."""
    return sum(len(generation.served.tokenizer.token_text(token_id)) for token_id in delta.token_ids)


def _choice(
    generation: Generation, request: CompletionRequest, index: int, deltas: list[Delta]
) -> dict[str, Any]:
    echo = _echo(generation, request, index)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    start = len(_scored_echo(generation, request, index))
    with_ids = request.return_token_ids
    token_ids = [i for delta in deltas for i in delta.token_ids] if with_ids else None
    return {
        "index": index,
        "text": echo + "".join(delta.text for delta in deltas),
        "logprobs": joined(
            _echoed_logprobs(generation, request, index, echo), _logprobs(generation, entries, start)
        ),
        "finish_reason": deltas[-1].finish_reason,
        "stop_reason": deltas[-1].stop_reason,
        "token_ids": token_ids,
        "prompt_logprobs": prompt_logprobs_field(generation, index),
        **token_fields(
            generation.served.tokenizer,
            generation.prompts[index // request.n] if with_ids else None,
            token_ids,
        ),
    }


def _first_chunk(generation: Generation, request: CompletionRequest, index: int, echo: str) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": echo,
        "logprobs": _echoed_logprobs(generation, request, index, echo),
        "finish_reason": None,
    }
    if request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs_field(generation, index)
    if request.return_token_ids:
        prompt = generation.prompts[index // request.n]
        choice |= token_fields(generation.served.tokenizer, prompt, None)
    return choice


def _chunk(
    generation: Generation, request: CompletionRequest, index: int, delta: Delta, offset: int
) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": delta.text,
        "logprobs": _logprobs(generation, delta.logprobs, offset),
        "finish_reason": delta.finish_reason,
    }
    if request.return_token_ids:
        choice |= token_fields(generation.served.tokenizer, None, delta.token_ids)
        choice["token_ids"] = delta.token_ids
    if delta.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    return choice


def _logprobs(
    generation: Generation, entries: tuple[Logprobs, ...] | list[Logprobs], offset: int
) -> dict[str, Any] | None:
    if generation.request.logprobs is None:
        return None
    return completion_logprobs(token_names(generation), entries, offset)
