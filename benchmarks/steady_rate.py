"""Sends requests at a steady rate through the router and records the chosen replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.router.asking import connect, read_body, read_head

#: A path that a replica answers without its model, so the load is on the router.
_QUESTION = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Asked:
    #: Seconds since `Steady.begin`.
    sent: float
    #: HTTP status; 0: the connection broke.
    status: int
    replica: str
    #: Replicas that failed before.
    in_vain: int


class Steady:
    """Sends `rate` requests per second, regardless of outstanding ones."""

    def __init__(self, port: int, rate: float) -> None:
        self._port = port
        self._rate = rate
        self._idle: list[_Connection] = []
        self._asked: list[Asked] = []

    def run(self, seconds: float, then: Callable[[], None], more: float) -> tuple[float, list[Asked]]:
        """Call `then`, which must be quick, after `seconds`, and continue for `more` seconds.

        Returns:
            The time of that call in seconds since the beginning, and all requests in the order of their
            answers.
        """
        self._asked = []
        return asyncio.run(self._run(seconds, then, more)), self._asked

    async def _run(self, seconds: float, then: Callable[[], None], more: float) -> float:
        began = time.monotonic()
        called = 0.0
        async with asyncio.TaskGroup() as group:
            for number in range(round((seconds + more) * self._rate)):
                due = number / self._rate
                await asyncio.sleep(began + due - time.monotonic())
                if due >= seconds and not called:
                    then()
                    called = time.monotonic() - began
                group.create_task(self._ask(began))
        while self._idle:
            self._idle.pop()[1].close()
        return called

    async def _ask(self, began: float) -> None:
        sent = time.monotonic() - began
        connection = self._idle.pop() if self._idle else await connect(self._port)
        reader, writer = connection
        try:
            writer.write(_QUESTION)
            head = await read_head(reader)
            await read_body(reader, head)
        except (OSError, EOFError):
            self._asked.append(Asked(sent, 0, "", 0))
            writer.close()
            return
        self._idle.append(connection)
        headers = head.headers
        self._asked.append(
            Asked(sent, head.status, headers.get("x-fd-replica", ""), int(headers.get("x-fd-retries", "0")))
        )
