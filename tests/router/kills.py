"""Load on replicas that get killed. It asserts that no request is lost and no text altered."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .asking import Answered, Broken, asking, generation
from .conftest import RouterProcess
from .fake_engine import wait_until
from .generation import CHAT, COMPLETIONS, Generation
from .replicas import Fleet

#: Signs of life, for replicas that hang now and then, and the router's patience with them.
SIGNS = "--sign-every=0.2"
PATIENCE = ("--progress-timeout-secs", "1")
#: Number of concurrent clients.
_CLIENTS = 32
#: Approximate seconds between a replica's return and the next kill. The return itself takes half a second.
#: With a shorter pause one request could lose three replicas in a row, and be taken for their killer.
_PEACE = 0.1
#: Seconds that a stopped replica hangs before it is killed.
_HANGING = 2.0


def requests_of(chance: random.Random) -> Iterator[Generation]:
    """Yield endless requests: short and long, streamed and not, with one or several choices."""
    while True:
        stream = chance.random() < 0.7
        yield generation(
            chance.choice([CHAT, COMPLETIONS]),
            seed=chance.getrandbits(50),
            stream=stream,
            n=chance.choice([1, 1, 2, 3]),
            max_tokens=chance.randint(1, 40),
            interval=chance.choice([0.0, 0.004, 0.012]),
            drafts=chance.choice([0, 3, 20]),
            delay=chance.choice([0.0, 0.01, 0.1]),
            frame=chance.choice([0, 0, 0, 50]),
            step=chance.choice([1, 1, 1, 4]),
            stream_options={"include_usage": stream and chance.random() < 0.5},
        )


@dataclass
class Load:
    router: RouterProcess
    fleet: Fleet
    chance: random.Random
    #: The signals that end replicas, one of which is drawn each time.
    ends: tuple[signal.Signals, ...] = (*[signal.SIGKILL] * 3, signal.SIGTERM)
    #: Fraction of clients that leave before the end of their answer.
    impatient: float = 0.0
    done: Counter[str] = field(default_factory=Counter)

    def run(self, count: int, seconds: float = 1e9) -> None:
        """Run `count` requests, or as many as fit into `seconds`; then assert that all counts are zero."""
        asyncio.run(self._run(self.done["requests"] + count, time.monotonic() + seconds))
        self.router.wait_idle()

    async def _run(self, count: int, end: float) -> None:
        requests = requests_of(random.Random(self.chance.getrandbits(64)))
        ended = threading.Event()

        async def client() -> None:
            while self.done["requests"] < count and time.monotonic() < end:
                self.done["requests"] += 1
                await self._ask(next(requests))

        killing = asyncio.create_task(asyncio.to_thread(self._kill, ended))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_CLIENTS):
                    group.create_task(client())
        finally:
            ended.set()
            await killing

    async def _ask(self, request: Generation) -> None:
        patience = self.chance.random() * 0.2 if self.chance.random() < self.impatient else None
        try:
            async with asyncio.timeout(patience):
                answer = await asking(self.router.port, request)
        except TimeoutError:
            self.done["clients gone"] += 1
        except Broken as broken:
            broken.add_note(f"{request}")
            raise
        else:
            answer.check()
            self._count(answer)

    def _count(self, answer: Answered) -> None:
        kind = "streams" if answer.generation.request["stream"] else "whole answers"
        self.done[kind] += 1
        self.done[f"{kind} resumed"] += bool(answer.resumed_by)
        self.done["requests retried"] += "x-fd-retries" in answer.headers

    def _kill(self, ended: threading.Event) -> None:
        while not ended.wait(_PEACE * (0.5 + self.chance.random())):
            replica, sig = self.chance.choice(self.fleet.replicas), self.chance.choice(self.ends)
            starts = replica.starts
            replica.send(sig)
            if sig is signal.SIGSTOP:
                ended.wait(_HANGING)
                replica.send(signal.SIGKILL)
            self.done[f"replicas ended by {sig.name}"] += 1
            wait_until(lambda: replica.starts > starts, "another one is started")  # noqa: B023
            self.fleet.wait_until_up()
