"""The text that the test replicas generate: a pure function of the request, so that it can be compared.

Texts contain characters whose bytes are spread over several tokens, and pieces that look like the protocol.
The choices of one request have different lengths.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fastdeploy.common.resumption import Delivered, mark

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DONE = b"data: [DONE]\n\n"
_WORDS = (
    *("the", " of", " rain", " in", " Spain", '"', "\\", "\n", "\n\n", "\r\n", " "),
    *(": fd 0 1", "\n: fd 0 1 .\n\n", "data: [DONE]", ":", "data: "),
)
#: Each byte of these is a token of its own.
_CHARACTERS = "äß€中あ𝄞🙂"
_VOCABULARY = [bytes([byte]) for byte in range(256)] + [word.encode() for word in _WORDS]


class Event(NamedTuple):
    data: bytes
    #: The mark that a router asks for, or nothing.
    mark: bytes

    @property
    def block(self) -> bytes:
        return b"data: %b\n%b\n" % (self.data, self.mark)


@dataclass(frozen=True)
class Generation:
    path: str
    body: bytes
    seed: int

    @cached_property
    def request(self) -> dict[str, Any]:
        request: dict[str, Any] = json.loads(self.body)
        return request

    @cached_property
    def choices(self) -> list[list[int]]:
        """Return the tokens of each choice."""
        return [self._tokens(choice) for choice in range(self.request.get("n", 1))]

    def contradiction(self, delivered: dict[int, Delivered]) -> str:
        """Return how `delivered` differs from the generated tokens; empty if it does not."""
        for choice, part in delivered.items():
            whole = self.choices[choice] if choice < len(self.choices) else []
            if part.tokens != whole[: len(part.tokens)]:
                return f"choice {choice}: other tokens"
            if part.finished and len(part.tokens) < len(whole):
                return f"choice {choice} had not finished"
        return ""

    def events(
        self, identity: str, created: int, delivered: dict[int, Delivered] | None = None
    ) -> Iterator[Event]:
        """Yield the events of the stream, or of its rest after `delivered`, without the final DONE.

        In each step each choice in turn takes `step` tokens.
        """
        begun = delivered or {}
        step = self.request.get("step", 1)
        counts = [0 if (part := begun.get(i)) is None else len(part.tokens) for i in range(len(self.choices))]
        marked = counts.copy()
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in self.choices]
        for decoder, tokens, count in zip(decoders, self.choices, counts, strict=True):
            decoder.decode(_bytes_of(tokens[:count]))
        roles_due = {i for i in range(len(counts)) if self.path == CHAT and i not in begun}
        open_choices = {i for i in range(len(counts)) if i not in begun or not begun[i].finished}
        while open_choices:
            i = min(open_choices, key=lambda each: (counts[each], each))
            tokens = self.choices[i]
            new = tokens[counts[i] : counts[i] + step]
            counts[i] += len(new)
            is_last = counts[i] == len(tokens)
            text = decoders[i].decode(_bytes_of(new), final=is_last)
            if not text and not is_last:
                continue
            if i in roles_due:
                roles_due.remove(i)
                yield Event(self._event(identity, created, i, None, None), mark(i))
            reason = self._reason(i) if is_last else None
            line = mark(i, tokens[marked[i] : counts[i]], finished=is_last)
            marked[i] = counts[i]
            yield Event(self._event(identity, created, i, text, reason), line)
            if is_last:
                open_choices.remove(i)
        if self.request.get("stream_options", {}).get("include_usage"):
            yield Event(
                _encode({**self._head(identity, created), "choices": [], "usage": self._usage()}), b""
            )

    def stream(self, identity: str, created: int) -> bytes:
        """Return the stream as a client receives it."""
        blocks = [b"data: %b\n\n" % event.data for event in self.events(identity, created)]
        return b"".join([*blocks, DONE])

    def whole(self, identity: str, created: int) -> bytes:
        """Return the answer that is not streamed."""
        choices = [self._choice(i, self.text(i), self._reason(i)) for i in range(len(self.choices))]
        return _encode({**self._head(identity, created), "choices": choices, "usage": self._usage()})

    def drafts(
        self, count: int, delivered: dict[int, Delivered] | None = None
    ) -> list[tuple[int, dict[int, list[int]]]]:
        """Return the drafts of a growing answer: the number and new tokens of each of `count` drafts in all.
        Drafts already delivered are left out. No draft completes a choice."""
        known = {choice: len(part.tokens) for choice, part in (delivered or {}).items()}
        drafts = []
        for number in range(count):
            new = {}
            for choice, tokens in enumerate(self.choices):
                start, end = known.get(choice, 0), (len(tokens) - 1) * (number + 1) // count
                if end > start:
                    known[choice] = end
                    new[choice] = tokens[start:end]
            if new:
                drafts.append((number, new))
        return drafts

    def text(self, choice: int) -> str:
        return _bytes_of(self.choices[choice]).decode("utf-8", "replace")

    def _tokens(self, choice: int) -> list[int]:
        key = hashlib.sha256(b"%d %d %b" % (self.seed, choice, self.body)).digest()
        chance = random.Random(key)
        most = self.request.get("max_tokens", 8)
        count = most - chance.randrange(most // 2 + 1) if choice else most
        tokens: list[int] = []
        while len(tokens) < count:
            if chance.random() < 0.4:
                tokens += chance.choice(_CHARACTERS).encode()
            else:
                tokens.append(256 + chance.randrange(len(_WORDS)))
        return tokens[:count]

    def _reason(self, choice: int) -> str:
        return "length" if len(self.choices[choice]) == self.request.get("max_tokens", 8) else "stop"

    def _usage(self) -> dict[str, int]:
        count = sum(map(len, self.choices))
        return {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}

    def _head(self, identity: str, created: int) -> dict[str, Any]:
        pad = "x" * self.request.get("pad", 0)
        return {"id": identity, "object": "chunk", "created": created, "model": "fake", "pad": pad}

    def _event(self, identity: str, created: int, choice: int, text: str | None, reason: str | None) -> bytes:
        if self.path == CHAT:
            delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
            part: dict[str, Any] = {"index": choice, "delta": delta, "finish_reason": reason}
        else:
            part = self._choice(choice, text or "", reason)
        return _encode({**self._head(identity, created), "choices": [part]})

    def _choice(self, choice: int, text: str, reason: str | None) -> dict[str, Any]:
        if self.path == CHAT:
            message = {"role": "assistant", "content": text}
            return {"index": choice, "message": message, "finish_reason": reason}
        return {"index": choice, "text": text, "finish_reason": reason}


def _bytes_of(tokens: list[int]) -> bytes:
    return b"".join(map(_VOCABULARY.__getitem__, tokens))


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
