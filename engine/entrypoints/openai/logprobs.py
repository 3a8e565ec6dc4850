"""Log probabilities in the two shapes that OpenAI has for them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...messages import Logprobs
from ...tokenizer import Tokenizer

#: JSON has no infinity; OpenAI writes a token that cannot occur like this.
_IMPOSSIBLE = -9999.0


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[Logprobs]) -> dict[str, Any]:
    content = [
        _chat_token(tokenizer, entry.token_id, entry.logprob)
        | {"top_logprobs": [_chat_token(tokenizer, token_id, value) for token_id, value in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, entries: Iterable[Logprobs], offset: int) -> dict[str, Any]:
    """`offset`: characters of the tokens that stand before the first of `entries`."""
    tokens, values, tops, offsets = [], [], [], []
    for entry in entries:
        text = tokenizer.token_text(entry.token_id)
        tokens.append(text)
        values.append(_finite(entry.logprob))
        tops.append({tokenizer.token_text(token_id): _finite(value) for token_id, value in entry.top})
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
