"""Interfaces between the requests of one worker and what they share."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from ....common.trace_context import TraceContext
from ....common.tracing import Tracing
from ..board.board import Board
from ..config.settings import Settings
from ..http.fast_path import FastPath
from ..http.request import ClientRequest
from ..http.upstream import ConnectionPool
from ..instance import ReplicaHandle
from ..metrics.metrics import Metrics
from .retry import RetryBudget
from .wait_queue import WaitQueue


class ActiveRequest(Protocol):
    """A request in flight, as the clock sees it."""

    def reset_silence_timer(self, now: float) -> None:
        """Restart the progress timeout after a period in which this process did not run."""

    def watch(self, now: float) -> None:
        """Fail the attempt if its replica has been silent for too long."""

    def make_way(self, handles: Collection[ReplicaHandle]) -> None:
        """Move to another replica if the current one is among `handles`, reserved for other requests."""


class FinishedRequest(NamedTuple):
    """Outcome of a request, for metrics and the access log."""

    id: str
    method: str
    path: str
    #: The replica that had the request at its end, if any.
    handle: ReplicaHandle | None
    #: HTTP status that the client got, 499 if it left before.
    status: int
    #: Bytes of body that the client was sent.
    size: int
    #: time.monotonic() of its arrival.
    arrived_at: float
    #: Why it ended early; empty if it did not.
    remark: str
    #: The trace that it belongs to, if any.
    trace: TraceContext | None


class Services(Protocol):
    """The part of the data plane that requests use. Belongs to the worker's event loop."""

    settings: Settings
    board: Board
    metrics: Metrics
    fast_path: FastPath
    pool: ConnectionPool
    budget: RetryBudget
    wait_queue: WaitQueue
    #: None where traces are off.
    tracing: Tracing | None

    def admit(self, active: ActiveRequest, request: ClientRequest) -> None:
        """Check the API key and the limit of requests in flight, and register the request.

        Raises:
            Refused: the key is invalid or the limit is reached.
        """

    def finished(self, active: ActiveRequest, record: FinishedRequest) -> None:
        """Unregister and record a request, and advance the wait queue."""

    def retry_after(self) -> int:
        """Return the seconds after which a request that finds no room should be repeated."""
