"""Waiting for other processes and threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(
    condition: Callable[..., Any], what: str = "what is tested", *, deadline: float, pause: float = 0.02
) -> Any:
    """Poll until `condition()` is true and return its value; fail after `deadline` seconds.

    Args:
        pause: seconds between two calls.
    """
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(pause)
    return value
