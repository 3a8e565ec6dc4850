"""The data plane of one worker: every request that is under way, and what they share."""

from __future__ import annotations

import logging
import time

from ..board.board import Board
from ..config.settings import Settings
from ..http import refusals
from ..http.fast_path import FastPath
from ..http.protocols import Client
from ..http.request import ClientRequest, Refused
from ..http.upstream import ConnectionPool
from ..http.write_batcher import WriteBatcher
from ..instance import ReplicaHandle
from ..metrics.access_log import AccessLog
from ..metrics.metrics import Metrics
from .delivery import Delivery
from .exchange import Exchange
from .retry import RetryBudget
from .wait_queue import WaitQueue, retry_after

logger = logging.getLogger(__name__)

#: Seconds between two ticks that do not come about by themselves: this process was stopped, or starved.
_AWAY = 2.0
#: Seconds in which the requests of a reserved replica may end before they have to make way.
_MAKE_WAY_AFTER = 1.0


class DataPlane:
    """Belongs to the worker's event loop."""

    def __init__(self, settings: Settings, board: Board, metrics: Metrics) -> None:
        self.settings = settings
        self.board = board
        self.metrics = metrics
        self.outbox = WriteBatcher()
        # A connection has one request under way.
        self.fast_path = FastPath(min(settings.max_in_flight, settings.max_connections))
        self.pool = ConnectionPool(self.outbox)
        self.access_log = AccessLog()
        self.budget = RetryBudget()
        self.line = WaitQueue(settings.queue_size)
        self.exchanges: set[Exchange] = set()
        self._ticked_at = 0.0

    def begin(self, client: Client, request: ClientRequest) -> Exchange:
        exchange = Exchange(self, client, request)
        exchange.start()
        return exchange

    def admit(self, request: ClientRequest) -> None:
        """
        Raises:
            Refused: it has no valid key, or one more is too many.
        """
        settings = self.settings
        is_open = not settings.keys or request.method == "OPTIONS"
        if not is_open and not settings.keys.allow(request.authorization):
            raise Refused(refusals.no_key())
        if len(self.exchanges) >= settings.max_in_flight:
            raise Refused(refusals.too_many_in_flight(settings.max_in_flight))

    def over(
        self,
        exchange: Exchange,
        request: ClientRequest,
        identity: str,
        handle: ReplicaHandle | None,
        delivery: Delivery,
        began_at: float,
        remark: str,
    ) -> None:
        """It is accounted for, and makes room. `seat`: where it was last, if a replica has it or had it."""
        self.exchanges.discard(exchange)
        now = time.monotonic()
        seconds, method, path, status = now - began_at, request.method, request.path, delivery.status
        try:
            self.metrics.answered(method, path, status, seconds)
            if handle is not None:
                self.metrics.inference(handle.url, status)
            self.access_log.add(
                f"request={identity[:64]} replica={handle.name if handle else '-'} {method} {path} "
                f"status={status} bytes={delivery.size} seconds={seconds:.3f}"
                + (f" ({remark})" if remark else "")
            )
        finally:
            # Its place is free even if the accounting fails.
            if self.line:
                self.line.advance(now)

    def tick(self, now: float) -> None:
        """Several times a second. A part that fails is logged, and the others still run."""
        for part in (lambda: self.pool.sweep(now), self.metrics.flush, lambda: self.line.advance(now)):
            try:
                part()
            except Exception:
                logger.exception("a periodic task of the data plane failed")
        was_away = now - self._ticked_at > _AWAY
        self._ticked_at = now
        for exchange in list(self.exchanges):
            if was_away:
                exchange.pardon(now)
            exchange.watch(now)
        if reserved := self.board.reserved_before(now - _MAKE_WAY_AFTER):
            for exchange in list(self.exchanges):
                exchange.make_way(reserved)

    def retry_after(self) -> int:
        """Seconds after which a request that finds everything full may come again."""
        return retry_after(len(self.line), self.board.drain_rate(), self.settings.queue_timeout)
