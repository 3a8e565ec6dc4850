"""Clients that ask without a pause, and compare what they hear with what they have heard before."""

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
    """So many, half of which keep their connections."""

    def __init__(self, port: int, count: int) -> None:
        self.count = count
        self.done: Counter[str] = Counter()
        #: The first ones, a line each.
        self.problems: list[str] = []
        self._known: list[tuple[Ask, Said]] = []
        self._clients = [StrictClient(port, keeps_connection=number % 2 == 0) for number in range(count)]
        #: Requests that each has made.
        self._counts = [0] * count

    def learn(self, asks: Sequence[Ask]) -> list[Said]:
        """Asks for each once. These answers are what is expected from now on. Raises Failed."""
        said = asyncio.run(self._learn(asks))
        self._known += zip(asks, said, strict=True)
        return said

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Meanwhile they ask for what they know; at the end they wait for the answers under way.

        None may have failed, and none may be another than before.
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
        counts = (f"{self.done[what]} {what}" for what in ("failed", "altered", "resumed", "begun anew"))
        return "\n".join([f"{self.done['requests']} requests: {', '.join(counts)}", *self.problems])

    def unanswered(self) -> set[tuple[int, int]]:
        """Requests under way of whose answers nothing has come yet: client and number."""
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
            # Each begins elsewhere, or all would ask for the long ones at the same time.
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
            self.done["begun anew"] += heard.begun_anew
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
