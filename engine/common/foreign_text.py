"""Text of another process, a file or a client: as JSON, and as it may stand in an error or a log line."""

from __future__ import annotations

import json
from typing import Any


def printable(text: object, limit: int = 200) -> str:
    """Return `text` in one line of about `limit` characters, with what cannot be printed escaped."""
    whole = str(text)
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in whole[:limit]
    )
    return f"{shown}... ({len(whole)} characters)" if len(whole) > limit else shown


def parse_json(text: str | bytes) -> Any:
    """`json.loads` whose only exception is ValueError, for text that is nested too deep as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
