"""The rows of the board: who has which, and the moves of their states. All calls come under the board's lock.

    FREE -> UP          it registered and is healthy
    FREE -> DOWN        read from the registry file: nobody has looked yet
    UP -> DOWN          failed twice in a row, or nobody listens on its port
    DOWN -> UP          answered a health check, and has not failed since it is on the board
    DOWN -> PROBING     answered a health check that began after its last failure, when its wait is over
    PROBING -> UP       a request succeeded; or there was none, and it was in good health for some seconds
    PROBING -> DOWN     failed
    any -> GONE         another instance is at its URL, it was removed, or it was DOWN and silent for minutes
    GONE -> FREE        the last of its requests has ended; so it is for those that have said farewell and are
                        not drained

A replica that is PROBING gets one request at a time. Its wait before that is 1 s; it doubles, up to 30 s,
each time that it goes down while PROBING or within 30 s of having come up: one that answers every other
request is used ever less. After 30 s of good behaviour it is 1 s again.

Every move ends with the one store that makes it valid, so that a holder of the lock may die anywhere in it.
The count of changes moves first: nobody takes what he read before for current.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from ..instance import Instance, RegistrationError
from ..policy.prefix_table import PrefixTable
from .memory import ENDINGS, REMOTE, RETIRED, ROWS, BoardMemory, Ending, Flag, Header, State, text_of

#: One hiccup is not a death; two in a row are.
FAILURES_TO_DOWN = 2
#: Seconds before a replica that went down is tried out.
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
#: Seconds up, after which a replica's past is forgiven.
CALM_AFTER = 30.0
#: Seconds of good health after which a replica that nobody tries out is up.
TRUSTED_AFTER = 5.0
#: Seconds for which an instance that has gone is not let in again.
RETIRED_FOR = 60.0

_IN_USE = (State.UP, State.DOWN, State.PROBING)


class Rows:
    def __init__(self, memory: BoardMemory, prefixes: PrefixTable) -> None:
        self._memory = memory
        self._prefixes = prefixes

    def is_in_use(self, row: int) -> bool:
        return self._memory.state[row] in _IN_USE

    def used(self) -> list[int]:
        """Rows of replicas that are on the board."""
        states = self._memory.state[: self._memory.header[Header.ROWS]].tolist()
        return [row for row, state in enumerate(states) if state in _IN_USE]

    def occupy(self, instance: Instance, up: bool, flags: Flag, now: float, ago: float) -> int:
        """`ago`: since its last heartbeat. Raises RegistrationError if there is no room."""
        memory = self._memory
        text = text_of(instance)
        row = self._free_row()
        self.changing()
        memory.generation[row] = memory.header[Header.GENERATION] = memory.header[Header.GENERATION] + 1
        memory.write_text(row, text)
        memory.failures[row] = memory.last_pick[row] = memory.picks[row] = 0
        memory.running[row] = memory.waiting[row] = memory.in_flight_then[row] = 0
        memory.probe_at[row] = memory.probe_wait[row] = memory.passed[row] = memory.seconds[row] = 0.0
        memory.failed_at[row] = memory.since[row] = now
        memory.heard_at[row] = now - ago
        memory.weight[row] = 1.0
        memory.flags[row] = flags
        memory.state[row] = State.UP if up else State.DOWN
        return row

    def renew(self, row: int, before: Instance, instance: Instance) -> bool:
        """The same start of a replica registers again. True if it says anything new."""
        if not instance.instance and self._memory.flags[row] & Flag.LEAVING:
            # One that has no id is welcome again: it may be another process.
            self.set_flag(row, Flag.LEAVING, False)
        if before == instance:
            return False
        text = text_of(instance)
        self.changing()
        self._memory.write_text(row, text)
        return True

    def hear(self, row: int, at: float) -> None:
        self._memory.heard_at[row] = max(at, self._memory.heard_at[row])

    def set_flag(self, row: int, flag: Flag, on: bool) -> None:
        self.changing()
        flags = self._memory.flags[row]
        self._memory.flags[row] = flags | flag if on else flags & ~flag

    def give_up(self, row: int) -> None:
        """any -> GONE: from now on it takes only the ends of its requests."""
        self.changing()
        self._memory.state[row] = State.GONE
        self.sweep()

    def sweep(self) -> None:
        """Frees the rows of those that are gone, or have said farewell, and whose requests have ended."""
        memory = self._memory
        for row in range(memory.header[Header.ROWS]):
            state = memory.state[row]
            # One that was drained keeps its row, so that whoever comes back at its URL is drained as well.
            said_farewell = memory.flags[row] & (Flag.LEAVING | Flag.DRAINING) == Flag.LEAVING
            left = state == State.GONE or (state in _IN_USE and said_farewell)
            if left and not self._has_requests(row):
                self.changing()
                memory.columns[REMOTE].in_flight[row] = memory.columns[REMOTE].tokens[row] = 0
                self._prefixes.forget_row(row)
                memory.state[row] = State.FREE

    def _has_requests(self, row: int) -> bool:
        return any(column.in_flight[row] for column in self._memory.columns[:REMOTE])

    def is_probed(self, row: int) -> bool:
        return any(column.probes[row] for column in self._memory.columns[:REMOTE])

    def fail(self, row: int, at_once: bool, now: float) -> bool:
        """True if it went down."""
        memory = self._memory
        state = memory.state[row]
        memory.failed_at[row] = now
        memory.failures[row] += 1
        if state == State.DOWN:
            return False
        if state == State.UP and not at_once and memory.failures[row] < FAILURES_TO_DOWN:
            return False
        wait = memory.probe_wait[row]
        calm = state == State.UP and (wait == 0.0 or now - memory.since[row] >= CALM_AFTER)
        wait = FIRST_WAIT if calm else max(FIRST_WAIT, min(LONGEST_WAIT, 2 * wait))
        memory.probe_at[row], memory.probe_wait[row] = now + wait, wait
        memory.lost_at[0] = now
        self._move(row, State.DOWN, now)
        return True

    def heal(self, row: int, asked_at: float, now: float) -> State | None:
        """It answered a health check; the state to which it moved."""
        memory = self._memory
        if asked_at < memory.failed_at[row]:
            return None  # the failure is news, the answer is not
        match memory.state[row]:
            case State.UP:
                memory.failures[row] = 0
            case State.DOWN if memory.failures[row] == 0:
                return self._move(row, State.UP, now)
            case State.DOWN if now >= memory.probe_at[row]:
                return self._move(row, State.PROBING, now)
            case State.PROBING if asked_at >= memory.since[row] + TRUSTED_AFTER and not self.is_probed(row):
                return self.succeed(row, now)
        return None

    def succeed(self, row: int, now: float) -> State | None:
        self._memory.failures[row] = 0
        return self._move(row, State.UP, now) if self._memory.state[row] == State.PROBING else None

    def set_load(self, row: int, running: int, waiting: int) -> None:
        self.changing()
        memory = self._memory
        memory.running[row], memory.waiting[row] = running, waiting
        memory.in_flight_then[row] = sum(column.in_flight[row] for column in memory.columns)

    def set_remote(self, loads: Mapping[int, tuple[int, int]]) -> None:
        """What other routers have at each row: requests and prompt tokens."""
        header, column = self._memory.header, self._memory.columns[REMOTE]
        if loads and not header[Header.HAS_REMOTE]:
            self.changing()
            header[Header.HAS_REMOTE] = 1
        for row in self.used():
            column.in_flight[row], column.tokens[row] = loads.get(row, (0, 0))

    def retire(self, instance: Instance, now: float) -> None:
        """Its last heartbeat may come after its farewell, or after the first of its successor."""
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

    def note_ending(self, url: str, instance: str, ending: Ending) -> None:
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

    def changing(self) -> None:
        """Before anything is stored that workers keep a copy of."""
        self._memory.header[Header.CHANGES] += 1

    def _move(self, row: int, state: State, now: float) -> State:
        self.changing()
        self._memory.since[row] = now
        self._memory.state[row] = state
        return state

    def _free_row(self) -> int:
        memory = self._memory
        self.sweep()
        for row in range(ROWS):
            if memory.state[row] == State.FREE:
                memory.header[Header.ROWS] = max(memory.header[Header.ROWS], row + 1)
                return row
        raise RegistrationError(f"the board is full: it has room for {ROWS} replicas", 503)


def key_of(url: str) -> int:
    """64 bits that stand for a replica on every router."""
    return int.from_bytes(blake2b(url.encode(), digest_size=8).digest(), "little")


def _start_of(instance: Instance) -> int:
    """What stands for this start of this replica; signed, as the cells are."""
    return _start(instance.url, instance.instance)


def _start(url: str, instance: str) -> int:
    text = f"{url} {instance}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
