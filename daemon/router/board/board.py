"""Which replicas there are, which of them may be chosen, and how many requests each has in flight.

One board for all workers of a router, in memory that they share. Choosing a replica and counting the request
on it is one act, under a lock that the kernel takes back from whoever dies (locks.py). Each worker
counts in a column of its own, which is cleared when it dies (worker_counters.py): a count is always the
number of requests of live workers. memory.py has the layout, rows.py the states of a replica.
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
from .lease import Lease, OwnCounters
from .locks import KernelLocks
from .memory import WORKERS, BoardError, BoardMemory, Ending, Flag, Header, State
from .rates import Measuring
from .rows import Rows
from .view import PickFailure, Status, View
from .worker_counters import Columns

__all__ = ["Board", "BoardError", "Ending", "Lease", "PickFailure", "ReplicaHandle", "State", "Status"]

logger = logging.getLogger(__name__)

#: Seconds without a heartbeat after which a replica that is down is forgotten.
FORGET_AFTER = 300.0
# For every pick: plain numbers index in half the time that members of an enum take.
_CHANGES, _PICKS = int(Header.CHANGES), int(Header.PICKS)
_UP = int(State.UP)
#: The mark of the worker that watches over the replicas; those below are the columns'.
_LEADER = WORKERS


class Board:
    """Thread-safe. Nothing in here waits for a replica, nor longer than microseconds for another process."""

    def __init__(self, descriptor: int, clock: Callable[[], float] = time.monotonic) -> None:
        """See `create` and `attach`. `clock` must be the same in all processes."""
        self._memory = BoardMemory(descriptor)
        self._clock = clock
        self._prefixes = PrefixTable(self._memory.prefix_table)
        self._rows = Rows(self._memory, self._prefixes)
        self._lock = KernelLocks(descriptor, after_fork=self._start_anew)
        self._start_anew()

    def _start_anew(self) -> None:
        self._leading = threading.Lock()
        self._leads = self._has_resigned = False
        self._view: View | None = None
        self._measuring = Measuring(self._memory, self._rows)
        self._columns = Columns(self._memory, self._rows, self._lock, self._clock)

    @classmethod
    def create(cls, clock: Callable[[], float] = time.monotonic) -> Board:
        """In the parent of all workers."""
        return cls(memory.create(), clock)

    @classmethod
    def attach(cls, descriptor: int, clock: Callable[[], float] = time.monotonic) -> Board:
        """One whose descriptor was inherited. Raises BoardError if it is none of this version."""
        return cls(descriptor, clock)

    @property
    def descriptor(self) -> int:
        return self._memory.descriptor

    @property
    def identity(self) -> str:
        """Of the board, whichever of its processes is asked."""
        return f"{self._memory.header[Header.IDENTITY]:016x}"

    def close(self) -> None:
        """Gives back what this process holds. Workers need not: the kernel does it when they end."""
        self._lock.close()
        os.close(self.descriptor)

    # ---- workers

    def open_column(self) -> int:
        """A place for this process to count in; after the fork, before its first pick.

        Raises BoardError if all are taken.
        """
        with self._lock:
            return self._columns.open()

    def drop_column_of(self, pid: int) -> None:
        """That worker has died, and its requests with it; so for all others of whom that is true."""
        with self._lock:
            self._columns.drop_dead()

    def pids(self) -> set[int]:
        """Of the workers. Without the lock, which one of them may have been stopped with."""
        return {pid for column in self._memory.columns[:WORKERS] if (pid := column.pid[0])}

    def lead(self) -> bool:
        """Whether it falls to this process to watch over the replicas: to one at a time, until it resigns."""
        with self._leading:
            if not self._leads and not self._has_resigned:
                self._leads = self._lock.take_mark(_LEADER)
            return self._leads

    def resign(self) -> None:
        """This process leads no more: it has been replaced, and another one knows better how."""
        with self._leading:
            self._has_resigned = True
            if self._leads:
                self._leads = False
                self._lock.give_back_mark(_LEADER)

    # ---- requests

    def pick(
        self, policy: Policy, facts: RequestFacts, exclude: Collection[ReplicaHandle] = ()
    ) -> Lease | PickFailure:
        """Chooses a replica and counts the request on it.

        Both in one critical section: otherwise all requests of a burst see the same idle replica.
        """
        own = self._columns.own
        assert own is not None, "a worker opens its column before it picks"
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
        own = self._columns.own
        assert own is not None, "a worker opens its column before it reserves"
        with self._lock:
            view = self._current()
            row = view.choose_to_reserve(exclude)
            if row is None:
                return None
            self._rows.changing()
            own.reserve(row, self._clock())
            return view.handles[row]

    def pick_reserved(self, handle: ReplicaHandle, facts: RequestFacts) -> Lease | PickFailure:
        """Count the request on the replica that is reserved for it.

        Return BUSY while the replica has other requests, and DOWN if it may no longer be chosen; then the
        reservation has ended.
        """
        own = self._columns.own
        assert own is not None, "a worker opens its column before it picks"
        with self._lock:
            view = self._current()
            if not self._is_there(handle) or handle.row not in view.usable:
                self._unreserve(handle)
                return PickFailure.DOWN
            if view.has_requests(handle.row):
                return PickFailure.BUSY
            return self._begin(own, view, handle.row, facts)

    def unreserve(self, handle: ReplicaHandle) -> None:
        with self._lock:
            self._unreserve(handle)

    def reserved_before(self, moment: float) -> set[ReplicaHandle]:
        """Return the replicas that were reserved before `moment`: their other requests have to make way."""
        with self._lock:
            view, columns = self._current(), self._memory.columns[:WORKERS]
            return {
                view.handles[row]
                for row in view.reserved
                if any(0.0 < column.reserved[row] < moment for column in columns)
            }

    def has_lost_one_since(self, moment: float) -> bool:
        """Return True if a replica was lost or left after `moment`, and no operator drains any replica."""
        # Soon after the machine has started, the moment may be negative, and 0 means never.
        if self._memory.lost_at[0] <= max(0.0, moment):
            return False
        with self._lock:
            flags = (self._memory.flags[row] for row in self._current().handles)
            return not any(flag & Flag.DRAINING for flag in flags)

    def drain_rate(self) -> float:
        """Requests that end per second, lately."""
        return self._memory.drain_rate[0]

    # ---- replicas

    def handles(self) -> list[ReplicaHandle]:
        with self._lock:
            return list(self._current().handles.values())

    def seat_of(self, url: str) -> ReplicaHandle | None:
        with self._lock:
            return self._seat_of(url)

    def status(self) -> list[Status]:
        """Everybody on the board, in the order of replica numbers."""
        with self._lock:
            return sorted(self._current().statuses(), key=Status.order)

    def admit(self, instance: Instance, up: bool = True, ago: float = 0.0) -> bool:
        """Seats an instance, or replaces what is known about it. True if that changed who is on the board.

        Another instance at a URL takes the place of the one before, with its operator's flag. One that was
        replaced or has said farewell is not admitted again for a while.

        Raises:
            RegistrationError: there is no room for it.
        """
        with self._lock:
            if self._rows.is_retired(instance, self._clock()):
                return False
            handle = self._seat_of(instance.url)
            if handle is not None and handle.instance.instance == instance.instance:
                self._rows.hear(handle.row, self._clock() - ago)
                return self._rows.renew(handle.row, handle.instance, instance)
            flags = Flag(0 if handle is None else self._memory.flags[handle.row]) & Flag.DRAINING
            if handle is not None:
                self._rows.retire(handle.instance, self._clock())
                self._rows.give_up(handle.row)
            self._rows.occupy(instance, up, flags, self._clock(), ago)
            event = "registered" if handle is None else "has been started anew"
            logger.info("replica=%s %s, url=%s", instance.name, event, instance.url)
            return True

    def heard(self, handle: ReplicaHandle, ago: float = 0.0) -> None:
        """A heartbeat came, `ago` seconds before now, whatever the health check says."""
        with self._lock:
            if self._is_there(handle):
                self._rows.hear(handle.row, self._clock() - ago)

    def deregister(self, url: str, instance_id: str) -> bool:
        """The instance says that it is about to end: it gets nothing new. False if it is not there."""
        with self._lock:
            handle = self._seat_of(url)
            if handle is None or handle.instance.instance != instance_id:
                return False
            self._rows.retire(handle.instance, self._clock())
            self._memory.lost_at[0] = self._clock()
            self._rows.set_flag(handle.row, Flag.LEAVING, True)
            self._rows.sweep()
            logger.info("replica=%s is leaving", handle.instance.name)
            return True

    def has_left(self, instance: Instance) -> bool:
        """Whether that start of it was replaced or said farewell lately."""
        with self._lock:
            return self._rows.is_retired(instance, self._clock())

    def note_ending(self, url: str, instance_id: str, ending: Ending) -> None:
        """Record how that start of a replica ended, as fd-dp reports it."""
        with self._lock:
            self._rows.note_ending(url, instance_id, ending)
            logger.info("replica at %s has ended: %s", url, ending.name.lower().replace("_", " "))

    def ending_of(self, handle: ReplicaHandle) -> Ending:
        with self._lock:
            return self._rows.ending_of(handle.instance)

    def drain(self, handle: ReplicaHandle) -> bool:
        """The operator wants nothing new there, until `undrain`. False if the replica has gone."""
        return self._set_draining(handle, True)

    def undrain(self, handle: ReplicaHandle) -> bool:
        return self._set_draining(handle, False)

    def remove(self, handle: ReplicaHandle) -> bool:
        """Takes it off the board, until its next heartbeat. Requests that it has go on."""
        with self._lock:
            if not self._is_there(handle):
                return False
            self._rows.give_up(handle.row)
            logger.info("replica=%s removed", handle.instance.name)
            return True

    # ---- how they are

    def healthy(self, handle: ReplicaHandle, asked_at: float) -> None:
        """It answered a health check that began at `asked_at`, which says nothing about a later failure."""
        if self._is_well(handle):
            return
        with self._lock:
            if self._is_there(handle):
                self._say(handle, self._rows.heal(handle.row, asked_at, self._clock()))

    def succeeded(self, handle: ReplicaHandle) -> None:
        """A request was answered there."""
        if self._is_well(handle):
            return
        with self._lock:
            if self._is_there(handle):
                self._say(handle, self._rows.succeed(handle.row, self._clock()))

    def failed(self, handle: ReplicaHandle, why: str) -> None:
        """A health check or a request failed in a way that may be a hiccup."""
        self._fail(handle, why, at_once=False)

    def unreachable(self, handle: ReplicaHandle, why: str) -> None:
        """Nobody accepts connections there: no request is sent to it until a health check succeeds."""
        self._fail(handle, why, at_once=True)

    def set_load(self, handle: ReplicaHandle, running: int, waiting: int) -> None:
        """What its metrics say just now."""
        with self._lock:
            if self._is_there(handle):
                self._rows.set_load(handle.row, running, waiting)

    def set_remote(self, loads: Mapping[ReplicaHandle, tuple[int, int]]) -> None:
        """What other routers have there: requests and prompt tokens. Nothing, where they are not named."""
        with self._lock:
            self._rows.set_remote(
                {handle.row: load for handle, load in loads.items() if self._is_there(handle)}
            )

    def measure(self, now: float) -> None:
        """Once a second, by the leader: weighs the replicas by their speed, and clears up after the dead."""
        with self._lock:
            self._columns.drop_dead()
            self._rows.sweep()
            self._measuring.measure(now)

    def forget_lost(self) -> bool:
        """Removes replicas that are down and have long been silent. True if there were any."""
        with self._lock:
            limit = self._clock() - FORGET_AFTER
            lost = [
                handle
                for handle in self._current().handles.values()
                if self._memory.state[handle.row] == State.DOWN and self._memory.heard_at[handle.row] < limit
            ]
            for handle in lost:
                self._rows.give_up(handle.row)
                name = handle.instance.name
                logger.warning("replica=%s forgotten: down and silent for %.0f s", name, FORGET_AFTER)
            return bool(lost)

    # ---- under the lock

    def _begin(self, own: OwnCounters, view: View, row: int, facts: RequestFacts) -> Lease:
        memory = self._memory
        memory.last_pick[row] = memory.header[_PICKS] = memory.header[_PICKS] + 1
        memory.picks[row] += 1
        return own.begin(view.handles[row], facts.prompt_tokens, row in view.probing)

    def _unreserve(self, handle: ReplicaHandle) -> None:
        own = self._columns.own
        if own is not None and own.has_reserved(handle.row):
            self._rows.changing()
            own.reserve(handle.row, 0.0)

    def _current(self) -> View:
        if self._view is None or self._view.changes != self._memory.header[_CHANGES]:
            self._view = View(self._memory, self._rows, self._prefixes, self._view)
        return self._view

    def _seat_of(self, url: str) -> ReplicaHandle | None:
        return next(
            (handle for handle in self._current().handles.values() if handle.instance.url == url), None
        )

    def _is_there(self, handle: ReplicaHandle) -> bool:
        return self._rows.is_in_use(handle.row) and self._memory.generation[handle.row] == handle.generation

    def _is_well(self, handle: ReplicaHandle) -> bool:
        """Without the lock: the usual case, in which there is nothing to do."""
        return self._memory.state[handle.row] == _UP and self._memory.failures[handle.row] == 0

    def _set_draining(self, handle: ReplicaHandle, on: bool) -> bool:
        with self._lock:
            if not self._is_there(handle):
                return False
            self._rows.set_flag(handle.row, Flag.DRAINING, on)
            logger.info("replica=%s %s", handle.instance.name, "drains" if on else "takes requests again")
            return True

    def _fail(self, handle: ReplicaHandle, why: str, at_once: bool) -> None:
        with self._lock:
            if not self._is_there(handle):
                return
            if self._rows.fail(handle.row, at_once, self._clock()):
                logger.warning("replica=%s is down: %s", handle.instance.name, why)
            elif self._memory.state[handle.row] != State.DOWN:
                logger.warning("replica=%s failed once, still in use: %s", handle.instance.name, why)

    def _say(self, handle: ReplicaHandle, state: State | None) -> None:
        if state is not None:
            news = "is up" if state == State.UP else "answers again: it gets one request to begin with"
            logger.info("replica=%s %s", handle.instance.name, news)
