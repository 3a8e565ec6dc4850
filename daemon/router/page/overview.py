"""State, load and rates of the replicas as JSON, for the page.

The replicas' metrics are read only while pages ask, at most once a second, whatever the number of pages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import msgspec

from .... import __version__
from ..board.board import Board, ReplicaHandle, ReplicaState, Status
from ..instance import Instance
from .samples import History, Sample, take_sample

#: Seconds for which an overview is served again.
_FRESH = 1.0
#: Seconds that an overview waits for samples. Later ones count in the next overview.
_PATIENCE = 0.6
_THREADS = 16


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica. Figures that are unknown are None."""

    #: Name as in X-FD-Replica.
    name: str
    #: up, probing, down, draining, leaving or reserved.
    state: str
    #: Requests that routers have sent to it.
    in_flight: int
    #: Sequences in its batch, and before it.
    running: int | None
    waiting: int | None
    #: Fraction of the KV cache in use, 0..1.
    kv_use: float | None
    tokens_per_second: float | None


class ExpertGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The expert group as its members report it."""

    epoch: int
    ranks: int
    #: Ranks in the epoch.
    members: list[int]
    joins: int | None
    leaves: int | None
    losses: int | None
    step_seconds: float | None
    #: The rank for which the others wait most, and the fraction of their time, 0..1.
    awaited: int | None
    awaited_share: float | None


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Content of /overview."""

    version: str
    policy: str
    replicas: list[Replica]
    experts: ExpertGroup | None


class Overview:
    """Overview of one board. Thread-safe."""

    def __init__(
        self,
        board: Board,
        policy: str,
        sample: Callable[[Instance], Sample | None] = take_sample,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._policy = policy
        self._sample = sample
        self._clock = clock
        self._refreshing = threading.Lock()
        self._json = b""
        self._read_at = float("-inf")
        self._histories: dict[ReplicaHandle, History] = {}
        self._pending: dict[ReplicaHandle, Future[Sample | None]] = {}
        # Threads start with the first overview.
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="overview")

    def json(self) -> bytes:
        """Return the overview. While one thread takes samples, others get the previous overview."""
        if self._clock() - self._read_at < _FRESH:
            return self._json
        if self._refreshing.acquire(blocking=not self._json):
            try:
                # Another thread may have just refreshed it.
                if self._clock() - self._read_at >= _FRESH:
                    self._refresh()
            finally:
                self._refreshing.release()
        return self._json

    def _refresh(self) -> None:
        rows = self._board.status()
        self._take_samples([row.handle for row in rows if row.up])
        now = self._clock()
        view = View(
            version=__version__,
            policy=self._policy,
            replicas=[_replica(row, self._history(row), now) for row in rows],
            experts=_experts({row.instance.replica: self._history(row) for row in rows if row.up}, now),
        )
        self._json = msgspec.json.encode(view)
        self._read_at = now

    def _history(self, row: Status) -> History:
        return self._histories.get(row.handle, History())

    def _take_samples(self, handles: list[ReplicaHandle]) -> None:
        for handle in handles:
            if handle not in self._pending:
                self._pending[handle] = self._pool.submit(self._sample, handle.instance)
        wait(self._pending.values(), _PATIENCE)
        self._histories = {handle: self._histories.get(handle, History()) for handle in handles}
        for handle, future in list(self._pending.items()):
            if future.done():
                del self._pending[handle]
                sample = future.result()
                if sample is not None and handle in self._histories:
                    self._histories[handle].add(sample)


def _replica(row: Status, history: History, now: float) -> Replica:
    sample = history.latest(now)
    if sample is None:
        sample, history = Sample(now, {}, {}), History()
    return Replica(
        name=row.instance.name,
        state=_state(row),
        in_flight=row.in_flight + row.in_flight_elsewhere,
        running=sample.count("num_requests_running"),
        waiting=sample.count("num_requests_waiting"),
        kv_use=sample.mean("gpu_cache_usage_perc"),
        tokens_per_second=history.rate("generation_tokens_total"),
    )


def _state(row: Status) -> str:
    if row.state == ReplicaState.DOWN:
        return "down"
    if row.leaving:
        return "leaving"
    if row.draining:
        return "draining"
    if row.reserved:
        return "reserved"
    return "up" if row.state == ReplicaState.UP else "probing"


def _experts(histories: Mapping[int | None, History], now: float) -> ExpertGroup | None:
    """Return the group with the newest epoch; None if no replica is in one."""
    found = {
        rank: (sample, history)
        for rank, history in histories.items()
        if rank is not None and (sample := history.latest(now)) and sample.count("ep_epoch") is not None
    }
    if not found:
        return None
    epoch = max(sample.count("ep_epoch") or 0 for sample, _ in found.values())
    members = {rank: pair for rank, pair in found.items() if pair[0].count("ep_epoch") == epoch}
    first, _ = next(iter(members.values()))
    awaited, share = _awaited({rank: history for rank, (_, history) in members.items()})
    return ExpertGroup(
        epoch=epoch,
        ranks=max(len(first.waited), *members, first.count("ep_active_seats") or 0),
        members=sorted(members),
        joins=first.count("ep_joins_total"),
        leaves=first.count("ep_leaves_total"),
        losses=first.count("ep_losses_total"),
        step_seconds=_step_seconds([history for _, history in members.values()]),
        awaited=awaited,
        awaited_share=share,
    )


def _step_seconds(histories: list[History]) -> float | None:
    seconds = sum(history.growth("ep_step_seconds_total") or 0.0 for history in histories)
    steps = sum(history.growth("ep_steps_total") or 0.0 for history in histories)
    return seconds / steps if steps else None


def _awaited(histories: Mapping[int, History]) -> tuple[int | None, float | None]:
    """Return the rank for which the others wait most, and the fraction of their time."""
    waited: dict[int, float] = {}
    time_of_others: dict[int, float] = {}
    for own, history in histories.items():
        for rank, seconds in enumerate(history.waited()):
            if rank != own:
                waited[rank] = waited.get(rank, 0.0) + seconds
                time_of_others[rank] = time_of_others.get(rank, 0.0) + history.seconds
    if not any(waited.values()):
        return None, None
    most = max(waited, key=waited.__getitem__)
    return most, min(1.0, waited[most] / time_of_others[most])
