"""What a policy wants to know of a request, found out with as little work as that takes.

The body is never parsed in full, and never judged: whatever is wrong with it, the replica will say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from itertools import accumulate

import msgspec

from .policy import Policy, RequestFacts

#: Names the conversation, so that its requests meet at one replica.
SESSION_HEADER = b"x-session-id"
#: English has about four bytes of UTF-8 for a token, and so has Chinese; JSON's marks are few beside them.
BYTES_PER_TOKEN = 4

#: A prompt is cut into blocks: fine ones at first, where shared instructions end, then ever coarser ones, so
#: that a long prompt has few. So many blocks are of one size before the next size begins.
FIRST_BLOCK, BLOCKS_OF_A_SIZE, SIZES = 256, 16, 6
#: Where blocks end, in bytes. What comes after the last, at 252 KB, decides nothing any more.
BLOCK_ENDS = tuple(accumulate(FIRST_BLOCK << size for size in range(SIZES) for _ in range(BLOCKS_OF_A_SIZE)))


def facts_of(policy: Policy, headers: Sequence[tuple[bytes, bytes]], body: bytes, draw: int) -> RequestFacts:
    """The names of the headers are in lower case; `draw` is 64 random bits."""
    return RequestFacts(
        draw,
        len(body) // BYTES_PER_TOKEN,
        prefix_hashes(prompt_text(body)) if policy.needs_prefix else (),
        session_of(headers, body) if policy.needs_session else b"",
    )


def prompt_text(body: bytes) -> bytes:
    """What the prompt is made from, in the order in which chat templates use it; b"" if there is no telling.

    It is the JSON as it was sent, escapes and all: the same text written in two ways is two prompts here,
    but a client always writes in the same way.
    """
    try:
        prompt = _prompts.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return b""
    parts = [prompt.tools]
    for message in prompt.messages:
        parts += (message.role, message.content, message.tool_calls)
    parts.append(prompt.prompt)
    return b"".join(parts)


def prefix_hashes(text: bytes) -> tuple[int, ...]:
    """A hash for each whole block: of the text from the very beginning to the block's end; never 0."""
    # The fastest by measurement of those that are the same in every process. Who makes them collide gains
    # nothing but a wrong guess of the router's.
    running = sha1(usedforsecurity=False)
    hashes = []
    begin = 0
    for end in BLOCK_ENDS:
        if end > len(text):
            break
        running.update(text[begin:end])
        hashes.append(int.from_bytes(running.digest()[:8], "little") or 1)
        begin = end
    return tuple(hashes)


def session_of(headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bytes:
    """What the header says, else the body's `user`."""
    for name, value in headers:
        if name == SESSION_HEADER and value:
            return value
    try:
        user = bytes(_users.decode(body).user)
    except (msgspec.DecodeError, RecursionError):
        return b""
    return user[1:-1] if user.startswith(b'"') else b""


# Raw: found and left alone. No text is decoded, so it need not be UTF-8 either.
_NOTHING = msgspec.Raw()


class _Message(msgspec.Struct):
    role: msgspec.Raw = _NOTHING
    content: msgspec.Raw = _NOTHING
    tool_calls: msgspec.Raw = _NOTHING


class _Prompt(msgspec.Struct):
    tools: msgspec.Raw = _NOTHING
    messages: list[_Message] = []
    prompt: msgspec.Raw = _NOTHING


class _User(msgspec.Struct):
    user: msgspec.Raw = _NOTHING


_prompts = msgspec.json.Decoder(_Prompt)
_users = msgspec.json.Decoder(_User)
