"""Rows of the board: assignment to replicas, and the transitions of their states.

    FREE -> UP          registered, and healthy
    FREE -> DOWN        read from the registry file, not yet checked
    UP -> DOWN          failed twice in a row, or refused a connection
    DOWN -> UP          passed a health check, and has not failed since it was registered
    DOWN -> PROBING     passed a health check that began after its last failure, and its wait is over
    PROBING -> UP       a request succeeded; or none came, and it was healthy for some seconds
    PROBING -> DOWN     failed
    any -> GONE         replaced by another instance at its URL, removed, or DOWN and silent for minutes
    GONE -> FREE        its last request has ended. A replica that has deregistered and is not drained becomes
                        FREE in the same way

A PROBING replica gets one request at a time. Its wait before that is 1 s. The wait doubles, up to 30 s, when
the replica goes down while PROBING or within 30 s of coming up, so that one that fails every other request is
used ever less. After 30 s without a failure it is 1 s again.

Each transition ends with the one store that makes it valid, so that a process may die anywhere in it. The
count of changes increases first, so that no process takes an old copy for current. All calls come under the
board's lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from ..instance import Instance, RegistrationError
from ..policy.prefix_table import PrefixTable
from .memory import ENDINGS, REMOTE, RETIRED, ROWS, BoardMemory, Ending, Flag, Header, ReplicaState, text_of

#: Consecutive failures that take a replica down.
FAILURES_TO_DOWN = 2
#: Seconds before a replica that went down is probed.
FIRST_WAIT, MAX_WAIT = 1.0, 30.0
#: Seconds of being up after which earlier failures no longer count.
CALM_AFTER = 30.0
#: Seconds of good health after which a PROBING replica without a request is UP.
TRUSTED_AFTER = 5.0
#: Seconds for which an instance that has gone is not admitted again.
RETIRED_FOR = 60.0

_IN_USE = (ReplicaState.UP, ReplicaState.DOWN, ReplicaState.PROBING)


class Rows:
    """Access to the rows of one board."""

    def __init__(self, memory: BoardMemory, prefixes: PrefixTable) -> None:
        self._memory = memory
        self._prefixes = prefixes

    def is_in_use(self, row: int) -> bool:
        return self._memory.state[row] in _IN_USE

    def used(self) -> list[int]:
        """Return the rows of replicas that are on the board."""
        states = self._memory.state[: self._memory.header[Header.ROWS]].tolist()
        return [row for row, state in enumerate(states) if state in _IN_USE]

    def occupy(self, instance: Instance, up: bool, flags: Flag, now: float, ago: float) -> int:
        """Give an instance a row and return it.

        Args:
            ago: seconds since its last heartbeat.

        Raises:
            RegistrationError: there is no free row.
        """
        memory = self._memory
        text = text_of(instance)
        row = self._free_row()
        self.begin_change()
        memory.generation[row] = memory.header[Header.GENERATION] = memory.header[Header.GENERATION] + 1
        memory.write_text(row, text)
        memory.failures[row] = memory.last_pick[row] = memory.pick_count[row] = 0
        memory.running[row] = memory.waiting[row] = memory.in_flight_at_poll[row] = 0
        memory.probe_at[row] = memory.probe_wait[row] = memory.passed[row] = memory.seconds[row] = 0.0
        memory.failed_at[row] = memory.since[row] = now
        memory.heartbeat_at[row] = now - ago
        memory.weight[row] = 1.0
        memory.flags[row] = flags
        memory.state[row] = ReplicaState.UP if up else ReplicaState.DOWN
        return row

    def update(self, row: int, before: Instance, instance: Instance) -> bool:
        """Store a new registration of the same instance; True if it differs from the one before."""
        if not instance.instance and self._memory.flags[row] & Flag.LEAVING:
            # Without an instance id it may be another process at the same URL.
            self.set_flag(row, Flag.LEAVING, False)
        if before == instance:
            return False
        text = text_of(instance)
        self.begin_change()
        self._memory.write_text(row, text)
        return True

    def record_heartbeat(self, row: int, at: float) -> None:
        self._memory.heartbeat_at[row] = max(at, self._memory.heartbeat_at[row])

    def set_flag(self, row: int, flag: Flag, on: bool) -> None:
        self.begin_change()
        flags = self._memory.flags[row]
        self._memory.flags[row] = flags | flag if on else flags & ~flag

    def vacate(self, row: int) -> None:
        """Move a row to GONE: only the ends of its requests still count."""
        self.begin_change()
        self._memory.state[row] = ReplicaState.GONE
        self.sweep()

    def sweep(self) -> None:
        """Free the rows of replicas that are gone or have deregistered, and have no requests left."""
        memory = self._memory
        for row in range(memory.header[Header.ROWS]):
            state = memory.state[row]
            # A drained replica keeps its row: the next instance at its URL is drained as well.
            deregistered = memory.flags[row] & (Flag.LEAVING | Flag.DRAINING) == Flag.LEAVING
            left = state == ReplicaState.GONE or (state in _IN_USE and deregistered)
            if left and not self._has_requests(row):
                self.begin_change()
                memory.counters[REMOTE].in_flight[row] = memory.counters[REMOTE].tokens[row] = 0
                self._prefixes.forget_row(row)
                memory.state[row] = ReplicaState.FREE

    def _has_requests(self, row: int) -> bool:
        return any(cells.in_flight[row] for cells in self._memory.counters[:REMOTE])

    def is_probed(self, row: int) -> bool:
        return any(cells.probes[row] for cells in self._memory.counters[:REMOTE])

    def fail(self, row: int, at_once: bool, now: float) -> bool:
        """Record a failure; True if the replica went down."""
        memory = self._memory
        state = memory.state[row]
        memory.failed_at[row] = now
        memory.failures[row] += 1
        if state == ReplicaState.DOWN:
            return False
        if state == ReplicaState.UP and not at_once and memory.failures[row] < FAILURES_TO_DOWN:
            return False
        wait = memory.probe_wait[row]
        calm = state == ReplicaState.UP and (wait == 0.0 or now - memory.since[row] >= CALM_AFTER)
        wait = FIRST_WAIT if calm else max(FIRST_WAIT, min(MAX_WAIT, 2 * wait))
        memory.probe_at[row], memory.probe_wait[row] = now + wait, wait
        memory.lost_at[0] = now
        self._move(row, ReplicaState.DOWN, now)
        return True

    def heal(self, row: int, asked_at: float, now: float) -> ReplicaState | None:
        """Record a health check that passed; return the state to which the replica moved, if any."""
        memory = self._memory
        if asked_at < memory.failed_at[row]:
            return None  # the failure is newer than the check
        match memory.state[row]:
            case ReplicaState.UP:
                memory.failures[row] = 0
            case ReplicaState.DOWN if memory.failures[row] == 0:
                return self._move(row, ReplicaState.UP, now)
            case ReplicaState.DOWN if now >= memory.probe_at[row]:
                return self._move(row, ReplicaState.PROBING, now)
            case ReplicaState.PROBING if asked_at >= memory.since[row] + TRUSTED_AFTER and not self.is_probed(
                row
            ):
                return self.succeed(row, now)
        return None

    def succeed(self, row: int, now: float) -> ReplicaState | None:
        self._memory.failures[row] = 0
        if self._memory.state[row] != ReplicaState.PROBING:
            return None
        return self._move(row, ReplicaState.UP, now)

    def set_load(self, row: int, running: int, waiting: int) -> None:
        self.begin_change()
        memory = self._memory
        memory.running[row], memory.waiting[row] = running, waiting
        memory.in_flight_at_poll[row] = sum(cells.in_flight[row] for cells in memory.counters)

    def set_remote(self, loads: Mapping[int, tuple[int, int]]) -> None:
        """Set other routers' requests and prompt tokens at each row; 0 for rows not in `loads`."""
        header, cells = self._memory.header, self._memory.counters[REMOTE]
        if loads and not header[Header.HAS_REMOTE]:
            self.begin_change()
            header[Header.HAS_REMOTE] = 1
        for row in self.used():
            cells.in_flight[row], cells.tokens[row] = loads.get(row, (0, 0))

    def retire(self, instance: Instance, now: float) -> None:
        """Refuse an instance from now on: its last heartbeat may arrive after its end."""
        if instance.instance:
            memory = self._memory
            number = memory.header[Header.RETIRED]
            memory.retired_at[number % RETIRED] = now
            memory.retired[number % RETIRED] = _start_of(instance)
            memory.header[Header.RETIRED] = number + 1

    def is_retired(self, instance: Instance, now: float) -> bool:
        retired, since = self._memory.retired.tolist(), self._memory.retired_at.tolist()
        start = _start_of(instance)
        return bool(instance.instance) and any(
            one == start and now - then < RETIRED_FOR for one, then in zip(retired, since, strict=True)
        )

    def record_ending(self, url: str, instance: str, ending: Ending) -> None:
        """Record an ending; a later report replaces an earlier one. The last store makes the slot valid."""
        memory = self._memory
        number = memory.header[Header.ENDINGS]
        slot = number % ENDINGS
        memory.ended_start[slot] = 0
        memory.ending[slot] = ending
        memory.ended_start[slot] = _start(url, instance)
        memory.header[Header.ENDINGS] = number + 1

    def ending_of(self, instance: Instance) -> Ending:
        if not instance.instance:
            return Ending.UNKNOWN
        memory = self._memory
        starts, start = memory.ended_start.tolist(), _start_of(instance)
        newest = memory.header[Header.ENDINGS] - 1
        slots = (number % ENDINGS for number in range(newest, max(-1, newest - ENDINGS), -1))
        return next((Ending(memory.ending[slot]) for slot in slots if starts[slot] == start), Ending.UNKNOWN)

    def begin_change(self) -> None:
        """Invalidate the workers' copies. Call this before a store to anything that they copy."""
        self._memory.header[Header.CHANGES] += 1

    def _move(self, row: int, state: ReplicaState, now: float) -> ReplicaState:
        self.begin_change()
        self._memory.since[row] = now
        self._memory.state[row] = state
        return state

    def _free_row(self) -> int:
        memory = self._memory
        self.sweep()
        for row in range(ROWS):
            if memory.state[row] == ReplicaState.FREE:
                memory.header[Header.ROWS] = max(memory.header[Header.ROWS], row + 1)
                return row
        raise RegistrationError(f"the board is full: it has room for {ROWS} replicas", 503)


def key_of(url: str) -> int:
    """Return 64 bits that identify a replica; every router gets the same."""
    return int.from_bytes(blake2b(url.encode(), digest_size=8).digest(), "little")


def _start_of(instance: Instance) -> int:
    return _start(instance.url, instance.instance)


def _start(url: str, instance: str) -> int:
    """Return 64 bits that identify one start of a replica; signed, as the cells are."""
    text = f"{url} {instance}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
