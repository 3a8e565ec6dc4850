"""Log probabilities in the formats of OpenAI and vLLM. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...common.messages import Logprobs
from ...tokenizer.tokenizer import Tokenizer

#: OpenAI's value for a token with probability 0; JSON has no infinity.
_IMPOSSIBLE = -9999.0


@dataclass(frozen=True, slots=True)
class TokenNames:
    """The names of tokens in log probabilities: texts, which several tokens may share, or ids."""

    tokenizer: Tokenizer
    by_id: bool = False

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.by_id else self.tokenizer.token_text(token_id)

    def text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id)


def chat_logprobs(names: TokenNames, entries: Iterable[Logprobs]) -> dict[str, Any]:
    """Return log probabilities for /v1/chat/completions."""
    content = [
        _chat_token(names, entry.token_id, entry.logprob)
        | {"top_logprobs": [_chat_token(names, token_id, value) for token_id, value in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(names: TokenNames, entries: Iterable[Logprobs], offset: int) -> dict[str, Any]:
    """Return log probabilities for /v1/completions.

    Args:
        offset: number of characters of all tokens before the first of `entries`.
    """
    parts = _Columns()
    for entry in entries:
        parts.add(names(entry.token_id), _finite(entry.logprob), _top(names, entry), offset)
        offset += len(names.text(entry.token_id))
    return parts.as_dict()


def echoed_logprobs(
    names: TokenNames, prompt: list[int], entries: list[Logprobs], count: int, text: str
) -> dict[str, Any]:
    """Return log probabilities of a prompt in the format of `completion_logprobs`; null for its first token.

    Args:
        entries: log probabilities of the tokens from the second on.
        count: number of most likely tokens at each position; -1: all.
        text: the prompt as the response shows it.
    """
    parts = _Columns()
    offsets = _offsets(names.tokenizer, prompt, text)
    parts.add(names(prompt[0]), None, None, offsets[0])
    for entry, offset in zip(entries, offsets[1:], strict=True):
        parts.add(names(entry.token_id), _finite(entry.logprob), _top(names, entry, count), offset)
    return parts.as_dict()


def prompt_logprobs(
    names: TokenNames, entries: Iterable[Logprobs], count: int
) -> list[dict[str, dict[str, Any]] | None]:
    """Return log probabilities of a prompt in vLLM's format: tokens by id; null for the first position.

    Args:
        entries: log probabilities of the tokens from the second on.
        count: number of most likely tokens at each position; -1: all.
    """
    return [None, *(_position(names, entry, count) for entry in entries)]


def joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the log probabilities of prompt and output as one object; either part may be missing."""
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}


class _Columns:
    """OpenAI's format for completions: one list per property of a token."""

    def __init__(self) -> None:
        self._tokens: list[str] = []
        self._values: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token: str, value: float | None, top: dict[str, float] | None, offset: int) -> None:
        self._tokens.append(token)
        self._values.append(value)
        self._tops.append(top)
        self._offsets.append(offset)

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._values,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }


def _position(names: TokenNames, entry: Logprobs, count: int) -> dict[str, dict[str, Any]]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, value, rank) for rank, (token_id, value) in enumerate(_first(entry, count), 1)]
    return {
        str(token_id): {"logprob": _finite(value), "rank": rank, "decoded_token": names.text(token_id)}
        for token_id, value, rank in ranked
    }


def _top(names: TokenNames, entry: Logprobs, count: int = -1) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, value in _first(entry, count):
        # Incomplete characters share one text; keep the most likely token.
        top.setdefault(names(token_id), _finite(value))
    # As in OpenAI's API, the drawn token is one of them in any case.
    top.setdefault(names(entry.token_id), _finite(entry.logprob))
    return top


def _first(entry: Logprobs, count: int) -> list[tuple[int, float]]:
    return entry.top if count == -1 else entry.top[:count]


def _offsets(tokenizer: Tokenizer, prompt: list[int], text: str) -> list[int]:
    """Return where each token begins in `text`. A special token has a length only where the text names it."""
    detokenizer = tokenizer.detokenizer()
    offsets, offset = [], 0
    for token_id in prompt:
        offsets.append(min(offset, len(text)))
        piece = detokenizer.push((token_id,))
        if tokenizer.is_special(token_id):
            name = tokenizer.token_text(token_id)
            piece = name if text.startswith(name, offset) else ""
        offset += len(piece)
    return offsets


def _chat_token(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": names(token_id),
        "logprob": _finite(logprob),
        "bytes": list(names.tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
