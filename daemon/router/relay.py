"""The data plane of one worker: every request that is under way, and what they share."""

from __future__ import annotations

from .access_log import AccessLog
from .board import Board
from .delivery import Client
from .exchange import Exchange
from .fast_path import FastPath
from .incoming import ClientRequest
from .metrics import Metrics
from .outbox import Outbox
from .retry import RetryBudget
from .settings import Settings
from .upstream import ConnectionPool
from .waiting import WaitingLine, retry_after

#: Seconds between two ticks that do not come about by themselves: this process was stopped, or starved.
_AWAY = 2.0


class DataPlane:
    """Belongs to the worker's event loop."""

    def __init__(self, settings: Settings, board: Board, metrics: Metrics) -> None:
        self.settings = settings
        self.board = board
        self.metrics = metrics
        self.outbox = Outbox()
        # A connection has one request under way.
        self.fast_path = FastPath(min(settings.max_in_flight, settings.max_connections))
        self.pool = ConnectionPool(self.outbox)
        self.access_log = AccessLog()
        self.budget = RetryBudget()
        self.line = WaitingLine(settings.queue_size)
        self.exchanges: set[Exchange] = set()
        self._ticked_at = 0.0

    def begin(self, client: Client, request: ClientRequest) -> Exchange:
        exchange = Exchange(self, client, request)
        exchange.start()
        return exchange

    def tick(self, now: float) -> None:
        """Several times a second."""
        self.pool.sweep(now)
        self.metrics.flush()
        self.line.advance(now)
        was_away = now - self._ticked_at > _AWAY
        self._ticked_at = now
        for exchange in list(self.exchanges):
            if was_away:
                exchange.pardon(now)
            exchange.watch(now)

    def retry_after(self) -> int:
        """Seconds after which a request that finds everything full may come again."""
        return retry_after(len(self.line), self.board.drain_rate(), self.settings.queue_timeout)
