"""A replica for the study of routing policies, in simulated time.

It models continuous batching, chunked prefill and a prefix cache of limited size.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from .router_traffic import BLOCK, Turn

#: Seconds of a step: fixed cost, per decoding text, and per prompt token; typical of a mid-size model on a
#: GPU.
STEP_SECONDS, TEXT_SECONDS, TOKEN_SECONDS = 0.015, 0.0004, 0.0001
MAX_TEXTS, CHUNK = 48, 1024


class Timeline:
    """The event queue."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._order), call))

    def run(self) -> None:
        while self._due:
            self.now, _, call = heapq.heappop(self._due)
            call()


@dataclass(slots=True)
class Job:
    turn: Turn
    arrived: float
    #: Called at the first and at the last token.
    began: Callable[[Job], None]
    ended: Callable[[Job], None]
    first_token_at: float = 0.0
    ended_at: float = 0.0
    cached_tokens: int = 0
    #: Remaining tokens of the prompt.
    remaining: int = 0


@dataclass(slots=True)
class Replica:
    time: Timeline
    #: Relative speed; 0.5 doubles all times.
    speed: float
    #: Capacity of the prefix cache, in addition to blocks in use.
    cache_blocks: int
    waiting: deque[Job] = field(default_factory=deque)
    _prefilling: deque[Job] = field(default_factory=deque)
    #: (step that yields the last token, tie breaker, job).
    _decoding: list[tuple[int, int, Job]] = field(default_factory=list)
    _cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _steps: int = 0
    _order: count[int] = field(default_factory=count)
    #: Steps in progress: number, start, and duration of one step. None: idle.
    _under_way: int = 0
    _since: float = 0.0
    _step: float = 0.0
    _generation: int = 0

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        if not self._under_way:
            self._begin()
        elif self._under_way > 1 and self.running < MAX_TEXTS:
            # Steps were combined; the combination now ends with the current step.
            done = max(1, math.ceil((self.time.now - self._since) / self._step))
            if done < self._under_way:
                self._schedule(done)

    def _begin(self) -> None:
        """Admit jobs that fit and begin a step, or combine all steps until the next text ends."""
        while self.waiting and self.running < MAX_TEXTS:
            job = self.waiting.popleft()
            # The last token is always computed, because its logits are needed.
            job.cached_tokens = min(self._cached(job.turn.prompt_blocks) * BLOCK, job.turn.prompt_tokens - 1)
            job.remaining = job.turn.prompt_tokens - job.cached_tokens
            self._prefilling.append(job)
        if not self.running:
            self._under_way = 0
            return
        room = CHUNK
        for job in self._prefilling:
            tokens = min(room, job.remaining)
            job.remaining -= tokens
            room -= tokens
            if not room:
                break
        seconds = STEP_SECONDS + TEXT_SECONDS * len(self._decoding) + TOKEN_SECONDS * (CHUNK - room)
        self._step = seconds / self.speed
        self._since = self.time.now
        self._schedule(1 if self._prefilling else self._decoding[0][0] - self._steps)

    def _schedule(self, steps: int) -> None:
        self._under_way = steps
        self._generation += 1
        generation = self._generation
        self.time.at(self._since + steps * self._step, lambda: self._end(generation))

    def _end(self, generation: int) -> None:
        if generation != self._generation:
            return
        self._steps += self._under_way
        now = self.time.now
        while self._prefilling and not self._prefilling[0].remaining:
            job = self._prefilling.popleft()
            job.first_token_at = now
            self._remember(job.turn.prompt_blocks)
            last = self._steps + job.turn.answer_tokens - 1
            heapq.heappush(self._decoding, (last, next(self._order), job))
            job.began(job)
        while self._decoding and self._decoding[0][0] <= self._steps:
            job = heapq.heappop(self._decoding)[2]
            job.ended_at = now
            self._remember(job.turn.all_blocks)
            job.ended(job)
        self._begin()

    def _cached(self, blocks: Sequence[int]) -> int:
        return next((depth for depth, block in enumerate(blocks) if block not in self._cache), len(blocks))

    def _remember(self, blocks: Sequence[int]) -> None:
        # The end of a text is evicted first, because others may share its beginning.
        for block in reversed(blocks):
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self.cache_blocks:
            self._cache.popitem(last=False)
