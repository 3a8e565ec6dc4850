"""JSON as text that can be sent as UTF-8."""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any) -> str:
    """Return a value as JSON. Raises ValueError for infinity, NaN and very deep nesting."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which a model can write as an escape.
        return json.dumps(value, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return text


def without_surrogates(text: str) -> str:
    """Return the text with surrogate pairs as characters, and with U+FFFD for a single half."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
