"""Requests and text of the benchmark of the HTTP API, and a stopwatch for short functions.

Peers import this file in an environment of their own, so it uses only the standard library.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = Path(__file__).with_name("text.txt").read_text(encoding="utf-8")
_QUESTION = TEXT[:400]
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 256, "seed": 7, "stop": ["###"]}
#: Number of streams and tokens per second of each, for which the share of a core is stated.
STREAMS, RATE = 64, 20


def conversation(turns: int) -> dict[str, Any]:
    """Return a chat request with so many questions."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for number in range(turns):
        messages.append({"role": "user", "content": f"({number}) {_QUESTION}"})
        if number < turns - 1:
            messages.append({"role": "assistant", "content": TEXT[number * 37 : number * 37 + 600]})
    return {
        "model": "default",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **_SAMPLING,
    }


#: Name -> body of a chat request.
REQUESTS = {
    "short_chat": json.dumps(conversation(1)).encode(),
    "long_chat": json.dumps(conversation(20)).encode(),
}


def microseconds(call: Callable[[], object], *, per: int = 1) -> float:
    """Return the median processor time of a call in microseconds, divided by `per`."""
    number, seconds = 1, 0.0
    while seconds < 0.02:
        number *= 2
        seconds = _seconds(call, number)
    return statistics.median(_seconds(call, number) for _ in range(9)) / number * 1e6 / per


def _seconds(call: Callable[[], object], number: int) -> float:
    started = time.process_time()
    for _ in range(number):
        call()
    return time.process_time() - started
