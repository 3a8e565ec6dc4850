"""The data plane of one worker: the requests in flight and what they share."""

from __future__ import annotations

import logging
import time

from ....common.api_paths import OPEN
from ....common.trace_context import trace_label
from ....common.tracing import Tracing
from ..board.board import Board
from ..config.settings import Settings
from ..http import refusals
from ..http.fast_path import FastPath
from ..http.protocols import Client
from ..http.request import ClientRequest, Refused
from ..http.upstream import ConnectionPool
from ..http.write_batcher import WriteBatcher
from ..metrics.access_log import AccessLog
from ..metrics.metrics import Metrics
from .exchange import Exchange
from .retry import RetryBudget
from .services import ActiveRequest, FinishedRequest
from .wait_queue import WaitQueue, retry_after

logger = logging.getLogger(__name__)

#: Seconds between two ticks after which this process is taken to have been stopped or starved.
_MAX_TICK_GAP = 2.0
#: Seconds in which the other requests of a reserved replica may end before they are moved.
_MAKE_WAY_AFTER = 1.0


class DataPlane:
    """Implements `Services`. Belongs to the worker's event loop."""

    def __init__(
        self, settings: Settings, board: Board, metrics: Metrics, tracing: Tracing | None = None
    ) -> None:
        self.settings = settings
        self.board = board
        self.metrics = metrics
        self.tracing = tracing
        self.outbox = WriteBatcher()
        # A client connection has one request in flight.
        self.fast_path = FastPath(min(settings.max_in_flight, settings.max_connections))
        self.pool = ConnectionPool(self.outbox)
        self.access_log = AccessLog()
        self.budget = RetryBudget()
        self.wait_queue = WaitQueue(settings.queue_size)
        self._active: set[ActiveRequest] = set()
        self._ticked_at = 0.0

    def begin(self, client: Client, request: ClientRequest) -> Exchange:
        exchange = Exchange(self, client, request)
        exchange.start()
        return exchange

    def admit(self, active: ActiveRequest, request: ClientRequest) -> None:
        settings = self.settings
        is_open = not settings.keys or request.method == "OPTIONS" or request.path in OPEN
        if not is_open and not settings.keys.allow(request.authorization):
            raise Refused(refusals.no_key())
        if len(self._active) >= settings.max_in_flight:
            raise Refused(refusals.too_many_in_flight(settings.max_in_flight))
        self._active.add(active)

    def finished(self, active: ActiveRequest, record: FinishedRequest) -> None:
        self._active.discard(active)
        now = time.monotonic()
        identity, method, path, handle, status, size, arrived_at, remark, trace = record
        seconds = now - arrived_at
        try:
            self.metrics.answered(method, path, status, seconds)
            if handle is not None:
                self.metrics.inference(handle.url, status)
            self.access_log.add(
                f"request={identity[:64]}{trace_label(trace) if trace else ''} "
                f"replica={handle.name if handle else '-'} {method} {path} "
                f"status={status} bytes={size} seconds={seconds:.3f}" + (f" ({remark})" if remark else "")
            )
        finally:
            # Its place is free even if the accounting fails.
            if self.wait_queue:
                self.wait_queue.advance(now)

    def tick(self, now: float) -> None:
        """Run what is periodic. A task that fails is logged and does not stop the others."""
        tasks = (lambda: self.pool.sweep(now), self.metrics.flush, lambda: self.wait_queue.advance(now))
        for task in tasks:
            try:
                task()
            except Exception:
                logger.exception("a periodic task of the data plane failed")
        was_stopped = now - self._ticked_at > _MAX_TICK_GAP
        self._ticked_at = now
        for active in list(self._active):
            if was_stopped:
                active.reset_silence_timer(now)
            active.watch(now)
        if reserved := self.board.reserved_before(now - _MAKE_WAY_AFTER):
            for active in list(self._active):
                active.make_way(reserved)

    def retry_after(self) -> int:
        """Return the seconds after which a request that finds no room should be repeated."""
        return retry_after(len(self.wait_queue), self.board.drain_rate(), self.settings.queue_timeout)
