"""FastDeploy's fields for token ids and their text, special tokens included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...tokenizer.tokenizer import Tokenizer


def token_fields(
    tokenizer: Tokenizer, prompt: list[int] | None, completion: Sequence[int] | None
) -> dict[str, Any]:
    """Return the four fields; those of None are null."""
    return {
        "prompt_token_ids": prompt,
        "completion_token_ids": completion,
        "prompt_tokens": _text(tokenizer, prompt),
        "completion_tokens": _text(tokenizer, completion),
    }


def _text(tokenizer: Tokenizer, token_ids: Sequence[int] | None) -> str | None:
    if token_ids is None:
        return None
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False, continues=True)
    return detokenizer.push(token_ids) + detokenizer.flush()
