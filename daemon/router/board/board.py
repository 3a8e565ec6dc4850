"""The board: replicas, their states, and the requests in flight at each, shared by all workers of a router.

Choosing a replica and counting the request on it is one critical section, under a lock that the kernel
releases when its holder dies (locks.py). Each worker has counters of its own, which are cleared when it dies
(worker_slots.py), so that their sum is always the number of requests of live workers. memory.py has the
layout, rows.py the states of a replica.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping

from ..instance import Instance, ReplicaHandle
from ..policy.policy import Policy, RequestFacts
from ..policy.prefix_table import PrefixTable
from . import memory
from .lease import Lease, WorkerCounters
from .locks import KernelLocks
from .memory import WORKERS, BoardError, BoardMemory, Ending, Flag, Header, ReplicaState
from .rates import RateMeter
from .rows import Rows
from .view import PickFailure, Status, View
from .worker_slots import WorkerSlots

__all__ = ["Board", "BoardError", "Ending", "Lease", "PickFailure", "ReplicaHandle", "ReplicaState", "Status"]

logger = logging.getLogger(__name__)

#: Seconds without a heartbeat after which a replica that is down is removed.
FORGET_AFTER = 300.0
# Used by every pick: an int indexes in half the time that an enum member takes.
_CHANGES, _PICKS = int(Header.CHANGES), int(Header.PICKS)
_UP = int(ReplicaState.UP)
#: Liveness lock of the leader, the worker that monitors the replicas. Lower numbers are the workers' slots.
_LEADER = WORKERS


class Board:
    """One process's access to the board. Thread-safe. No call waits for a replica or takes milliseconds."""

    def __init__(self, descriptor: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Use `create` or `attach`. `clock` must be the same in all processes."""
        self._memory = BoardMemory(descriptor)
        self._clock = clock
        self._prefixes = PrefixTable(self._memory.prefix_table)
        self._rows = Rows(self._memory, self._prefixes)
        self._lock = KernelLocks(descriptor, after_fork=self._reset)
        self._reset()

    def _reset(self) -> None:
        self._leading = threading.Lock()
        self._leads = self._has_resigned = False
        self._view: View | None = None
        self._rates = RateMeter(self._memory, self._rows)
        self._slots = WorkerSlots(self._memory, self._rows, self._lock, self._clock)

    @classmethod
    def create(cls, clock: Callable[[], float] = time.monotonic) -> Board:
        """Create an empty board, in the parent of all workers."""
        return cls(memory.create(), clock)

    @classmethod
    def attach(cls, descriptor: int, clock: Callable[[], float] = time.monotonic) -> Board:
        """Use a board whose descriptor was inherited. Raises BoardError if it is of another version."""
        return cls(descriptor, clock)

    @property
    def descriptor(self) -> int:
        return self._memory.descriptor

    @property
    def identity(self) -> str:
        """Board id, the same in every process."""
        return f"{self._memory.header[Header.IDENTITY]:016x}"

    def close(self) -> None:
        """Release what this process holds. When a worker ends, the kernel does it."""
        self._lock.close()
        os.close(self.descriptor)

    # ---- workers

    def open_counters(self) -> int:
        """Take a slot for this process's counters, after the fork and before its first pick.

        Return its number. Raises BoardError if all slots are taken.
        """
        with self._lock:
            return self._slots.open()

    def drop_dead_workers(self) -> None:
        """Clear the counters of workers that have died, and their requests with them."""
        with self._lock:
            self._slots.drop_dead()

    def pids(self) -> set[int]:
        """Return the pids of the workers. Lock-free: a stopped worker may hold the lock."""
        return {pid for cells in self._memory.counters[:WORKERS] if (pid := cells.pid[0])}

    def try_lead(self) -> bool:
        """Try to become the leader, the one process that monitors the replicas; True while it leads."""
        with self._leading:
            if not self._leads and not self._has_resigned:
                self._leads = self._lock.take_liveness(_LEADER)
            return self._leads

    def resign(self) -> None:
        """Stop leading for good: this process has been replaced by one with a newer configuration."""
        with self._leading:
            self._has_resigned = True
            if self._leads:
                self._leads = False
                self._lock.release_liveness(_LEADER)

    # ---- requests

    def pick(
        self, policy: Policy, facts: RequestFacts, exclude: Collection[ReplicaHandle] = ()
    ) -> Lease | PickFailure:
        """Choose a replica and count the request on it.

        Both are one critical section; otherwise all requests of a burst would see the same idle replica.
        """
        own = self._slots.own
        assert own is not None, "a worker opens its counters before it picks"
        with self._lock:
            view = self._current()
            row = view.choose(policy, facts, exclude)
            if not isinstance(row, int):
                return row
            return self._begin(own, view, row, facts)

    def reserve(self, exclude: Collection[ReplicaHandle] = ()) -> ReplicaHandle | None:
        """Reserve a replica for one request of this worker: it gets no other request until `unreserve`.

        Return None if no replica can be spared. A reservation ends with its worker.
        """
        own = self._slots.own
        assert own is not None, "a worker opens its counters before it reserves"
        with self._lock:
            view = self._current()
            row = view.choose_to_reserve(exclude)
            if row is None:
                return None
            self._rows.begin_change()
            own.reserve(row, self._clock())
            return view.handles[row]

    def pick_reserved(self, handle: ReplicaHandle, facts: RequestFacts) -> Lease | PickFailure:
        """Count the request on the replica that is reserved for it.

        Return BUSY while the replica has other requests, and DOWN if it may no longer be chosen; then the
        reservation has ended.
        """
        own = self._slots.own
        assert own is not None, "a worker opens its counters before it picks"
        with self._lock:
            view = self._current()
            if not self._is_current(handle) or handle.row not in view.usable:
                self._unreserve(handle)
                return PickFailure.DOWN
            if view.has_requests(handle.row):
                return PickFailure.BUSY
            return self._begin(own, view, handle.row, facts)

    def unreserve(self, handle: ReplicaHandle) -> None:
        with self._lock:
            self._unreserve(handle)

    def reserved_before(self, moment: float) -> set[ReplicaHandle]:
        """Return the replicas that were reserved before `moment`; their other requests have to move."""
        with self._lock:
            view, counters = self._current(), self._memory.counters[:WORKERS]
            return {
                view.handles[row]
                for row in view.reserved
                if any(0.0 < cells.reserved[row] < moment for cells in counters)
            }

    def has_lost_one_since(self, moment: float) -> bool:
        """Return True if a replica was lost or left after `moment`, and no replica is drained."""
        # The moment may be negative soon after the machine has started, and 0 means never.
        if self._memory.lost_at[0] <= max(0.0, moment):
            return False
        with self._lock:
            flags = (self._memory.flags[row] for row in self._current().handles)
            return not any(flag & Flag.DRAINING for flag in flags)

    def drain_rate(self) -> float:
        """Return the recent rate of requests that end, per second."""
        return self._memory.drain_rate[0]

    # ---- replicas

    def handles(self) -> list[ReplicaHandle]:
        with self._lock:
            return list(self._current().handles.values())

    def handle_of(self, url: str) -> ReplicaHandle | None:
        with self._lock:
            return self._handle_of(url)

    def status(self) -> list[Status]:
        """Return all replicas on the board, in the order of their numbers."""
        with self._lock:
            return sorted(self._current().statuses(), key=Status.order)

    def admit(self, instance: Instance, up: bool = True, ago: float = 0.0) -> bool:
        """Register an instance, or update its registration; True if that changed the board.

        A new instance at a known URL replaces the old one and inherits its drain flag. An instance that was
        replaced or has deregistered is not admitted again for a while.

        Args:
            ago: seconds since its last heartbeat.

        Raises:
            RegistrationError: the board is full.
        """
        with self._lock:
            if self._rows.is_retired(instance, self._clock()):
                return False
            handle = self._handle_of(instance.url)
            if handle is not None and handle.instance.instance == instance.instance:
                self._rows.record_heartbeat(handle.row, self._clock() - ago)
                return self._rows.update(handle.row, handle.instance, instance)
            flags = Flag(0 if handle is None else self._memory.flags[handle.row]) & Flag.DRAINING
            if handle is not None:
                self._rows.retire(handle.instance, self._clock())
                self._rows.vacate(handle.row)
            self._rows.occupy(instance, up, flags, self._clock(), ago)
            event = "registered" if handle is None else "has restarted"
            logger.info("replica=%s %s, url=%s", instance.name, event, instance.url)
            return True

    def record_heartbeat(self, handle: ReplicaHandle, ago: float = 0.0) -> None:
        """Record a heartbeat that came `ago` seconds ago, independent of health checks."""
        with self._lock:
            if self._is_current(handle):
                self._rows.record_heartbeat(handle.row, self._clock() - ago)

    def deregister(self, url: str, instance_id: str) -> bool:
        """Send no new requests to an instance that is about to end. False if it is not registered."""
        with self._lock:
            handle = self._handle_of(url)
            if handle is None or handle.instance.instance != instance_id:
                return False
            self._rows.retire(handle.instance, self._clock())
            self._memory.lost_at[0] = self._clock()
            self._rows.set_flag(handle.row, Flag.LEAVING, True)
            self._rows.sweep()
            logger.info("replica=%s is leaving", handle.instance.name)
            return True

    def has_left(self, instance: Instance) -> bool:
        """Return True if the instance was replaced or has deregistered within the last minute."""
        with self._lock:
            return self._rows.is_retired(instance, self._clock())

    def record_ending(self, url: str, instance_id: str, ending: Ending) -> None:
        """Record how an instance ended, as fd-dp reports it."""
        with self._lock:
            self._rows.record_ending(url, instance_id, ending)
            cause = "from outside" if ending is Ending.FROM_OUTSIDE else "by its own fault"
            logger.info("replica at %s ended: %s", url, cause)

    def ending_of(self, handle: ReplicaHandle) -> Ending:
        with self._lock:
            return self._rows.ending_of(handle.instance)

    def drain(self, handle: ReplicaHandle) -> bool:
        """Send no new requests to a replica until `undrain`. False if it has gone."""
        return self._set_draining(handle, True)

    def undrain(self, handle: ReplicaHandle) -> bool:
        return self._set_draining(handle, False)

    def remove(self, handle: ReplicaHandle) -> bool:
        """Remove a replica until its next heartbeat; its requests continue. False if it has gone."""
        with self._lock:
            if not self._is_current(handle):
                return False
            self._rows.vacate(handle.row)
            logger.info("replica=%s removed", handle.instance.name)
            return True

    # ---- health

    def healthy(self, handle: ReplicaHandle, asked_at: float) -> None:
        """Record a passed health check that began at `asked_at`. It does not outweigh a later failure."""
        if self._is_healthy(handle):
            return
        with self._lock:
            if self._is_current(handle):
                self._log_state(handle, self._rows.heal(handle.row, asked_at, self._clock()))

    def succeeded(self, handle: ReplicaHandle) -> None:
        """Record that the replica answered a request."""
        if self._is_healthy(handle):
            return
        with self._lock:
            if self._is_current(handle):
                self._log_state(handle, self._rows.succeed(handle.row, self._clock()))

    def failed(self, handle: ReplicaHandle, why: str) -> None:
        """Record a failed health check or request. The failure may be transient."""
        self._fail(handle, why, at_once=False)

    def unreachable(self, handle: ReplicaHandle, why: str) -> None:
        """Take a replica down that refuses connections, until a health check passes."""
        self._fail(handle, why, at_once=True)

    def set_load(self, handle: ReplicaHandle, running: int, waiting: int) -> None:
        """Set the numbers of running and waiting requests that the replica's own metrics show."""
        with self._lock:
            if self._is_current(handle):
                self._rows.set_load(handle.row, running, waiting)

    def set_remote(self, loads: Mapping[ReplicaHandle, tuple[int, int]]) -> None:
        """Set other routers' requests and prompt tokens at each replica; 0 for replicas not in `loads`."""
        with self._lock:
            self._rows.set_remote(
                {handle.row: load for handle, load in loads.items() if self._is_current(handle)}
            )

    def measure(self, now: float) -> None:
        """Update the replicas' weights and drop dead workers. The leader calls this once a second."""
        with self._lock:
            self._slots.drop_dead()
            self._rows.sweep()
            self._rates.measure(now)

    def forget_lost(self) -> bool:
        """Remove replicas that are down and have sent no heartbeat for minutes; True if there were any."""
        with self._lock:
            limit = self._clock() - FORGET_AFTER
            lost = [
                handle
                for handle in self._current().handles.values()
                if self._memory.state[handle.row] == ReplicaState.DOWN
                and self._memory.heartbeat_at[handle.row] < limit
            ]
            for handle in lost:
                self._rows.vacate(handle.row)
                name = handle.instance.name
                logger.warning("replica=%s removed: down, and no heartbeat for %.0f s", name, FORGET_AFTER)
            return bool(lost)

    # ---- called under the lock

    def _begin(self, own: WorkerCounters, view: View, row: int, facts: RequestFacts) -> Lease:
        memory = self._memory
        memory.last_pick[row] = memory.header[_PICKS] = memory.header[_PICKS] + 1
        memory.pick_count[row] += 1
        return own.begin(view.handles[row], facts.prompt_tokens, row in view.probing)

    def _unreserve(self, handle: ReplicaHandle) -> None:
        own = self._slots.own
        if own is not None and own.has_reserved(handle.row):
            self._rows.begin_change()
            own.reserve(handle.row, 0.0)

    def _current(self) -> View:
        if self._view is None or self._view.changes != self._memory.header[_CHANGES]:
            self._view = View(self._memory, self._rows, self._prefixes, self._view)
        return self._view

    def _handle_of(self, url: str) -> ReplicaHandle | None:
        return next(
            (handle for handle in self._current().handles.values() if handle.instance.url == url), None
        )

    def _is_current(self, handle: ReplicaHandle) -> bool:
        return self._rows.is_in_use(handle.row) and self._memory.generation[handle.row] == handle.generation

    def _is_healthy(self, handle: ReplicaHandle) -> bool:
        """Return True if there is nothing to do, the usual case. Lock-free."""
        return self._memory.state[handle.row] == _UP and self._memory.failures[handle.row] == 0

    def _set_draining(self, handle: ReplicaHandle, on: bool) -> bool:
        with self._lock:
            if not self._is_current(handle):
                return False
            self._rows.set_flag(handle.row, Flag.DRAINING, on)
            news = "is draining" if on else "takes requests again"
            logger.info("replica=%s %s", handle.instance.name, news)
            return True

    def _fail(self, handle: ReplicaHandle, why: str, at_once: bool) -> None:
        with self._lock:
            if not self._is_current(handle):
                return
            if self._rows.fail(handle.row, at_once, self._clock()):
                logger.warning("replica=%s is down: %s", handle.instance.name, why)
            elif self._memory.state[handle.row] != ReplicaState.DOWN:
                logger.warning("replica=%s failed once and stays in use: %s", handle.instance.name, why)

    def _log_state(self, handle: ReplicaHandle, state: ReplicaState | None) -> None:
        if state is not None:
            news = (
                "is up"
                if state == ReplicaState.UP
                else "passes health checks again; it gets one request at first"
            )
            logger.info("replica=%s %s", handle.instance.name, news)
