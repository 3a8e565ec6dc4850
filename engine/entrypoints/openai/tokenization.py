"""/tokenize and /detokenize, as in vLLM."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from ...common.errors import RequestError
from .bodies import Message, Name, TokenId
from .chat import render_chat
from .keep_alive import KeepAlive
from .prompts import read_messages, read_template_arguments
from .served_model import ServedModel
from .unsupported import TOKENIZE_FIELDS
from .validation import MISSING, Body, Refused, validated


class TokenizeBody(Body, frozen=True, kw_only=True):
    """Body of /tokenize: either a text or messages."""

    refused: ClassVar[Mapping[str, Refused]] = TOKENIZE_FIELDS

    model: Name | None = None
    prompt: Annotated[str | None, Meta(description="A text.")] = None
    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1)] | None,
        Meta(extra={"expected": "a list of messages"}, description="For the chat template."),
    ] = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="Default: true for a text, false for messages.")
    ] = None
    return_token_strs: Annotated[bool | None, Meta(description="Return the text of each token too.")] = None
    add_generation_prompt: Annotated[bool | None, Meta(description="Default: true.")] = None
    chat_template: Annotated[str, Meta(max_length=1 << 16)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body, frozen=True, kw_only=True):
    """Body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Meta(extra={"expected": "a list of token ids"})]
    skip_special_tokens: Annotated[bool | None, Meta(description="Default: false.")] = None


def tokenize(served: ServedModel, values: dict[str, Any], keep_alive: KeepAlive | None) -> dict[str, Any]:
    """Return the response of /tokenize. Raises RequestError."""
    body = validated(values, TokenizeBody)
    served.require_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        given = "both" if body.messages is not None else "neither"
        raise RequestError(f"prompt or messages must be given, and {given} is", "prompt", code=MISSING)
    is_chat = body.messages is not None
    text = _chat_text(served, values, body, keep_alive) if is_chat else body.prompt
    assert text is not None, "there is a prompt if there are no messages"
    special = not is_chat if body.add_special_tokens is None else body.add_special_tokens
    tokens = served.tokenizer.encode(text, add_special_tokens=special)
    return {
        "count": len(tokens),
        "max_model_len": served.config.engine.max_model_len,
        "tokens": tokens,
        "token_strs": list(map(served.tokenizer.token_text, tokens)) if body.return_token_strs else None,
    }


def detokenize(served: ServedModel, values: dict[str, Any]) -> dict[str, Any]:
    """Return the response of /detokenize. Raises RequestError."""
    body = validated(values, DetokenizeBody)
    served.require_model(body.model)
    served.require_known(body.tokens, "tokens")
    return {
        "prompt": served.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens or False)
    }


def _chat_text(
    served: ServedModel, values: dict[str, Any], body: TokenizeBody, keep_alive: KeepAlive | None
) -> str:
    assert body.messages is not None
    return render_chat(
        served,
        read_messages(values["messages"], body.messages),
        body.chat_template,
        {"add_generation_prompt": body.add_generation_prompt is not False}
        | read_template_arguments(body.chat_template_kwargs or {}),
        int(time.time()),
        keep_alive,
    )
