"""Facts of a request that policies use, extracted with as little work as possible.

The body is not validated and never parsed in full: the replica reports what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from itertools import accumulate

import msgspec

from .policy import Policy, RequestFacts

#: Header with the id of a conversation, whose requests go to the same replica.
SESSION_HEADER = b"x-session-id"
#: Bytes of UTF-8 per token, about the same for English and Chinese; JSON adds little.
BYTES_PER_TOKEN = 4

#: A prompt is cut into blocks: small ones first, where shared instructions end, then ever larger ones, so
#: that a long prompt has few. Size of the first block in bytes, blocks of each size, and number of sizes,
#: each of which is twice the one before.
FIRST_BLOCK, BLOCKS_OF_A_SIZE, SIZES = 256, 16, 6
#: Ends of the blocks in bytes. Text after the last one, at 252 KB, is ignored.
BLOCK_ENDS = tuple(accumulate(FIRST_BLOCK << size for size in range(SIZES) for _ in range(BLOCKS_OF_A_SIZE)))


def facts_of(policy: Policy, headers: Sequence[tuple[bytes, bytes]], body: bytes, draw: int) -> RequestFacts:
    """Return the facts of a request that the policy uses.

    Args:
        headers: with names in lower case.
        draw: 64 random bits.
    """
    return RequestFacts(
        draw,
        len(body) // BYTES_PER_TOKEN,
        prefix_hashes(prompt_text(body)) if policy.needs_prefix else (),
        session_of(headers, body) if policy.needs_session else b"",
    )


def prompt_text(body: bytes) -> bytes:
    """Return the parts of the prompt in the order in which chat templates use them; b"" if not known.

    This is the JSON as it was sent, with its escapes. The same text escaped in two ways counts as two
    prompts, but each client always escapes in the same way.
    """
    try:
        prompt = _prompts.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return b""
    parts = [prompt.tools]
    for message in prompt.messages:
        parts += (message.role, message.content, message.tool_calls)
    parts += (prompt.instructions, prompt.input, prompt.prompt, prompt.prompt_token_ids)
    return b"".join(parts)


def prefix_hashes(text: bytes) -> tuple[int, ...]:
    """Return the hash of the text up to the end of each complete block; never 0."""
    # The fastest of the hashes that are the same in every process, by measurement. A forged collision only
    # makes the router guess wrong.
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
    """Return the session header, or else the body's `user`."""
    for name, value in headers:
        if name == SESSION_HEADER and value:
            return value
    try:
        user = bytes(_users.decode(body).user)
    except (msgspec.DecodeError, RecursionError):
        return b""
    return user[1:-1] if user.startswith(b'"') else b""


# msgspec.Raw leaves a value undecoded, so that it need not be valid UTF-8.
_NOTHING = msgspec.Raw()


class _Message(msgspec.Struct):
    role: msgspec.Raw = _NOTHING
    content: msgspec.Raw = _NOTHING
    tool_calls: msgspec.Raw = _NOTHING


class _Prompt(msgspec.Struct):
    tools: msgspec.Raw = _NOTHING
    messages: list[_Message] = []
    instructions: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    prompt: msgspec.Raw = _NOTHING
    prompt_token_ids: msgspec.Raw = _NOTHING


class _User(msgspec.Struct):
    user: msgspec.Raw = _NOTHING


_prompts = msgspec.json.Decoder(_Prompt)
_users = msgspec.json.Decoder(_User)
