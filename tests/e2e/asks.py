"""Requests of every kind to a real system, and the comparable content of answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from ..router.generation import CHAT, COMPLETIONS

#: The content of an answer, choice by choice, without the parts that vary: id, time, cached tokens.
Said = tuple[bytes, ...]

#: The tiny checkpoint has no template.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
_PROMPTS = (
    "The sea",
    "Grüße, 世界! 🙂",
    "hello world " * 30,
    "the quick brown fox jumps over the lazy dog " * 3,
)


@dataclass(frozen=True)
class Ask:
    """A request that is sent repeatedly."""

    path: str
    fields: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        return bool(self.fields["stream"])


def draw_requests(chance: Random, count: int, tokens: tuple[int, int]) -> list[Ask]:
    """Return chat requests and completions, streamed and whole, greedy and sampled, of `tokens` length.

    Whole answers are short, as the router gives up a request after three replicas in a row have died.
    """
    asks = []
    for number in range(count):
        path = (COMPLETIONS, CHAT)[number % 2]
        stream = number % 4 != 3
        low, high = tokens if stream else (8, tokens[0])
        fields: dict[str, Any] = {
            "model": "tiny",
            "stream": stream,
            "max_tokens": chance.randint(low, high),
            "temperature": (0.0, 0.8, 1.4)[number % 3],
            "seed": chance.getrandbits(50),
            "ignore_eos": number % 7 != 6,
            "n": 2 if number % 5 == 4 else 1,
        }
        text = f"{number} {_PROMPTS[chance.randrange(len(_PROMPTS))]}"
        if path == CHAT:
            fields |= {"messages": [{"role": "user", "content": text}]}
            if number % 16 == 1:
                # A request's own template is rendered in a separate process.
                fields |= {"chat_template": f"Chat!\n{TEMPLATE}"}
        else:
            fields |= {"prompt": text}
        if stream and number % 3 == 1:
            fields["stream_options"] = {"include_usage": True}
        if number % 8 == 5:
            fields |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
        if number % 9 == 4:
            fields |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "return_token_ids": True}
        asks.append(Ask(path, fields))
    return asks


def stopped_in_the_middle(ask: Ask, said: Said) -> Ask:
    """Return the request with a stop string that occurs in the second half of its (first) text."""
    text = text_of(said)
    for start in range(len(text) // 2, len(text) - 3):
        stop = text[start : start + 3]
        if text.find(stop) == start and "\ufffd" not in stop:
            return replace(ask, fields={**ask.fields, "stop": ["never, ever", stop]})
    return ask


def text_of(said: Said) -> str:
    """Return the text of the first choice."""
    choices = (choice for part in said for choice in json.loads(part)["choices"] if choice["index"] == 0)
    parts = []
    for choice in choices:
        message = choice.get("delta") or choice.get("message")
        parts.append(choice["text"] if message is None else message.get("content", ""))
    return "".join(parts)
