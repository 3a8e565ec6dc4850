"""Traffic for the study of routing policies: random conversations from a seed.

Shapes and lengths are like those of public traces of chat services: a few assistants whose instructions many
conversations share, histories that grow from turn to turn, questions about long documents, bursts of jobs.
A user sends the next turn some time after the answer to the previous one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import msgspec

from fastdeploy.daemon.router.policy.policies import request_num
from fastdeploy.daemon.router.policy.policy import Policy, RequestFacts
from fastdeploy.daemon.router.policy.request_facts import BYTES_PER_TOKEN, facts_of

#: Tokens per block of the prefix caches.
BLOCK = 64
#: Extracts all facts of a request.
_CURIOUS = Policy("curious", request_num, needs_prefix=True, needs_session=True)

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    facts: RequestFacts
    prompt_tokens: int
    answer_tokens: int
    #: Cache blocks of the prompt, and of prompt and answer. A block identifies all text up to its end.
    prompt_blocks: Sequence[int]
    all_blocks: Sequence[int]
    #: Seconds after the end of the previous answer.
    pause: float


@dataclass(frozen=True, slots=True)
class Conversation:
    start: float
    turns: Sequence[Turn]


#: Returns conversations for a duration in seconds and a rate in requests per second.
Kind = Callable[[Random, float, float], Iterator[Conversation]]


def chat(random: Random, rate: float, seconds: float) -> Iterator[Conversation]:
    """Twelve assistants of very different popularity; named users; about five turns."""
    instructions = [_text(random, _around(random, 1500, 0.7, 4000)) for _ in range(12)]
    popularity = [1 / (place + 1) for place in range(12)]
    for start in _arrivals(random, rate / 5, seconds):
        messages = [_message("system", random.choices(instructions, popularity)[0])]
        user = f"user-{random.getrandbits(48):x}"
        turns: list[Turn] = []
        while not turns or random.random() < 0.8:
            messages.append(_message("user", _text(random, _around(random, 60, 1.0, 2000))))
            pause = random.expovariate(1 / 12)
            turns.append(_turn(random, messages, _around(random, 180, 0.7, 1000), pause, user))
        yield Conversation(start, turns)


def documents(random: Random, rate: float, seconds: float) -> Iterator[Conversation]:
    """Questions about private documents after shared instructions; a third of the users ask again."""
    instructions = [_text(random, 300) for _ in range(3)]
    for start in _arrivals(random, rate / 1.33, seconds):
        document = random.choice(instructions) + _text(random, _around(random, 4000, 0.5, 12000))
        messages = [_message("system", document)]
        turns: list[Turn] = []
        while not turns or (len(turns) == 1 and random.random() < 0.33):
            messages.append(_message("user", _text(random, 40)))
            pause = random.expovariate(1 / 15)
            turns.append(_turn(random, messages, _around(random, 120, 0.5, 500), pause))
        yield Conversation(start, turns)


def bursts(random: Random, rate: float, seconds: float) -> Iterator[Conversation]:
    """Bursts of eighty prompts with the same short instructions; answers of all lengths."""
    for start in _arrivals(random, rate / 80, seconds):
        instructions = _message("system", _text(random, 150))
        for _ in range(80):
            messages = [instructions, _message("user", _text(random, _around(random, 250, 0.6, 1500)))]
            yield Conversation(start, [_turn(random, messages, _around(random, 150, 1.0, 1500), 0.0)])


def traffic(rates: Mapping[Kind, float], seed: int, seconds: float) -> list[Conversation]:
    """Draw the conversations of all kinds; `rates` has the requests per second of each."""
    return [
        conversation
        for kind, rate in rates.items()
        for conversation in kind(Random(f"{kind.__name__} {seed}"), rate, seconds)
    ]


def _arrivals(random: Random, rate: float, seconds: float) -> Iterator[float]:
    now = random.expovariate(rate)
    while now < seconds:
        yield now
        now += random.expovariate(rate)


def _around(random: Random, median: int, spread: float, most: int) -> int:
    """Return a lognormal length, which is typical of texts."""
    return min(most, max(4, int(median * random.lognormvariate(0, spread))))


def _text(random: Random, tokens: int) -> str:
    return random.randbytes(tokens * BYTES_PER_TOKEN // 2).hex()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _turn(random: Random, messages: list[Message], answer_tokens: int, pause: float, user: str = "") -> Turn:
    """Append the answer to the messages."""
    body = {"model": "default", "messages": messages, "stream": True} | ({"user": user} if user else {})
    facts = facts_of(_CURIOUS, (), msgspec.json.encode(body), random.getrandbits(64))
    prompt = _rendered(messages)
    messages.append(_message("assistant", _text(random, answer_tokens)))
    return Turn(
        facts,
        len(prompt) // BYTES_PER_TOKEN,
        answer_tokens,
        _blocks(prompt),
        _blocks(_rendered(messages)),
        pause,
    )


def _rendered(messages: Sequence[Message]) -> str:
    """Render the messages like a chat template."""
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def _blocks(text: str) -> list[int]:
    size = BLOCK * BYTES_PER_TOKEN
    blocks: list[int] = []
    so_far = 0
    for begin in range(0, len(text) - size + 1, size):
        so_far = hash((so_far, text[begin : begin + size]))
        blocks.append(so_far)
    return blocks
