"""Asks the replicas how they are: each for itself, so that one that hangs holds up no other."""

from __future__ import annotations

import logging
import threading
import time

from .board import Board, Seat
from .registration import Instance
from .registry import RegistryFile
from .upstream import Cancellation, Connections, Request, UpstreamError

logger = logging.getLogger(__name__)

#: Below the 5 s after which an instance gives up its registration, which waits for this.
_TIMEOUT = 4.0


def check(instance: Instance) -> str | None:
    """None if GET /health answers 200, else what is wrong. Blocks for seconds at most."""
    try:
        # A new connection each time: a listener that no longer accepts is part of the question.
        reply = Connections(_TIMEOUT).send(instance, Request("GET", "/health", []), Cancellation())
    except UpstreamError as error:
        return str(error)
    reply.close()
    status = reply.response.status
    return None if status == 200 else f"{instance.authority} answered /health with {status}"


class Monitor:
    """The thread that has every replica checked now and then, and forgets those that are lost."""

    def __init__(
        self, board: Board, registry: RegistryFile, connections: Connections, interval: float
    ) -> None:
        self._board = board
        self._registry = registry
        self._connections = connections
        self._interval = interval
        self._lock = threading.Lock()
        self._being_checked: set[Seat] = set()

    def start(self) -> None:
        """After the fork: threads do not survive one."""
        threading.Thread(target=self._run, name="monitor", daemon=True).start()

    def _run(self) -> None:
        while True:
            for seat in self._board.seats():
                threading.Thread(target=self._check, args=(seat,), name="health", daemon=True).start()
            self._connections.sweep()
            if self._board.forget_lost():
                self._registry.save(self._board)
            time.sleep(self._interval)

    def _check(self, seat: Seat) -> None:
        with self._lock:
            if seat in self._being_checked:
                return  # the look before this one is still waiting
            self._being_checked.add(seat)
        try:
            asked_at = time.monotonic()
            problem = check(seat.instance)
            if problem is None:
                self._board.healthy(seat, asked_at)
            else:
                self._board.failed(seat, problem)
        finally:
            with self._lock:
                self._being_checked.discard(seat)
