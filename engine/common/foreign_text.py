"""Untrusted text from files, clients and other processes: parsing as JSON, and escaping for messages."""

from __future__ import annotations

import json
from typing import Any


def printable(text: object, limit: int = 200) -> str:
    """Return `text` as one line of about `limit` characters, with unprintable characters escaped."""
    whole = str(text)
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in whole[:limit]
    )
    return f"{shown}... ({len(whole)} characters)" if len(whole) > limit else shown


def parse_json(text: str | bytes, *, allow_surrogates: bool = True) -> Any:
    """Parse JSON, like `json.loads`, but raise only ValueError, even for values that are nested too deeply.

    Raises:
        UnicodeEncodeError: a text has a lone surrogate, and `allow_surrogates` is False. It is a ValueError.
    """
    try:
        value = json.loads(text)
        if not allow_surrogates:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
