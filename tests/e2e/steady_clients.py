"""Clients that send requests without a pause and compare the answers with those of an undisturbed run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .asks import Ask, Said
from .strict_client import Failed, StrictClient

_MOST_PROBLEMS = 20


class Clients:
    """A number of clients, half of which reuse their connections."""

    def __init__(self, port: int, count: int) -> None:
        self.count = count
        self.done: Counter[str] = Counter()
        #: The first problems, a line each.
        self.problems: list[str] = []
        self._known: list[tuple[Ask, Said]] = []
        self._clients = [StrictClient(port, keeps_connection=number % 2 == 0) for number in range(count)]
        #: Number of completed requests by client.
        self._counts = [0] * count

    def learn(self, asks: Sequence[Ask]) -> list[Said]:
        """Send each request once; its answer is expected from now on. Raises Failed."""
        said = asyncio.run(self._learn(asks))
        self._known += zip(asks, said, strict=True)
        return said

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Send the learned requests within the block; at its end, wait for answers in progress.

        No request may fail, and no answer may differ from the expected one.
        """
        over = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            work = pool.submit(lambda: asyncio.run(self._work(over)))
            try:
                yield
            finally:
                over.set()
                work.result()
        assert not self.problems, "\n".join(self.problems)

    def report(self) -> str:
        counts = (f"{self.done[what]} {what}" for what in ("failed", "altered", "resumed", "restarted"))
        return "\n".join([f"{self.done['requests']} requests: {', '.join(counts)}", *self.problems])

    def unanswered(self) -> set[tuple[int, int]]:
        """Return the client and number of each request whose answer has not begun."""
        return {(n, self._counts[n]) for n, client in enumerate(self._clients) if client.is_waiting}

    async def _learn(self, asks: Sequence[Ask]) -> list[Said]:
        said: dict[int, Said] = {}
        numbers = iter(range(len(asks)))

        async def ask(client: StrictClient) -> None:
            for number in numbers:
                said[number] = (await client.ask(asks[number])).said

        async with asyncio.TaskGroup() as group:
            for client in self._clients:
                group.create_task(ask(client))
        self._close()
        return [said[number] for number in range(len(asks))]

    async def _work(self, over: threading.Event) -> None:
        async def ask(client: int) -> None:
            # Each client begins at another request; otherwise all would send the long ones at the same time.
            turn = client * len(self._known) // len(self._clients)
            while not over.is_set():
                await self._ask(client, *self._known[turn % len(self._known)])
                turn += 1

        async with asyncio.TaskGroup() as group:
            for client in range(len(self._clients)):
                group.create_task(ask(client))
        self._close()

    async def _ask(self, client: int, ask: Ask, expected: Said) -> None:
        try:
            heard = await self._clients[client].ask(ask)
        except Failed as error:
            self._problem("failed", f"{error} ({ask})")
        else:
            if heard.said != expected:
                self._problem("altered", f"{_difference(expected, heard.said)} ({ask})")
            self.done["resumed"] += heard.resumed
            self.done["restarted"] += heard.restarted
        self.done["requests"] += 1
        self._counts[client] += 1

    def _problem(self, what: str, problem: str) -> None:
        self.done[what] += 1
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(f"{what}: {problem}")

    def _close(self) -> None:
        for client in self._clients:
            client.close()


def _difference(expected: Said, found: Said) -> str:
    for number, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return f"part {number} is {other[:300]!r}, not {one[:300]!r}"
    return f"{len(found)} parts, not {len(expected)}"
