"""Fields about the tokens of a choice, which chats and completions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...tokenizer.tokenizer import Tokenizer
from .generation import Generation
from .logprobs import TokenNames, prompt_logprobs


def token_fields(
    tokenizer: Tokenizer, prompt: list[int] | None, completion: Sequence[int] | None
) -> dict[str, Any]:
    """Return FastDeploy's fields for token ids and their text with special tokens; those of None are null."""
    return {
        "prompt_token_ids": prompt,
        "completion_token_ids": completion,
        "prompt_tokens": _text(tokenizer, prompt),
        "completion_tokens": _text(tokenizer, completion),
    }


def token_names(generation: Generation) -> TokenNames:
    """Return the names of tokens in the log probabilities of a response."""
    return TokenNames(generation.served.tokenizer, generation.request.names_token_ids)


def prompt_logprobs_field(generation: Generation, index: int) -> list[Any] | None:
    """Return the field `prompt_logprobs` of a begun choice; null unless it was requested."""
    count = generation.request.prompt_logprobs
    if count is None:
        return None
    return prompt_logprobs(token_names(generation), generation.prompt_logprobs(index), count)


def _text(tokenizer: Tokenizer, token_ids: Sequence[int] | None) -> str | None:
    if token_ids is None:
        return None
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False, continues=True)
    return detokenizer.push(token_ids) + detokenizer.flush()
