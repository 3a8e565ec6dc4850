"""/tokenize and /detokenize, as in vLLM."""

from __future__ import annotations

import time
from typing import Any

from ...common.errors import RequestError
from .bodies import DetokenizeBody, TokenizeBody
from .chat import render_chat
from .keep_alive import KeepAlive
from .prompts import read_messages, template_arguments
from .served_model import ServedModel
from .tool_fields import read_tools
from .validation import MISSING, validated


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
    messages = read_messages(values["messages"], body.messages)
    tools = read_tools(body.tools, None, None)
    return render_chat(
        served,
        messages,
        body.chat_template,
        template_arguments(body, messages),
        int(time.time()),
        keep_alive,
        continue_final_message=body.continue_final_message or False,
        tools=None if tools is None else tools.definitions,
    )
