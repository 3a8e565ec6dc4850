"""A worker's copy of the slow-changing part of the board, so that a pick reads only the counters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from operator import add
from typing import Any

from ..instance import Instance, ReplicaHandle
from ..policy.policy import Candidates, Policy, RequestFacts
from ..policy.prefix_table import PrefixTable
from .memory import REMOTE, WORKERS, BoardMemory, Flag, Header, ReplicaState
from .rows import Rows, key_of


class PickFailure(Enum):
    """Reason why no replica was picked. It is false, a lease is true."""

    #: No replica may be chosen.
    DOWN = auto()
    #: All replicas that may be chosen are full.
    BUSY = auto()

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Status:
    """A replica at one moment."""

    handle: ReplicaHandle
    state: ReplicaState
    #: The operator wants no new requests there.
    draining: bool
    #: The replica itself wants no new requests.
    leaving: bool
    #: It gets no new requests until a request that may kill replicas has been tried there alone.
    reserved: bool
    #: Requests of this router.
    in_flight: int
    #: Requests of other routers, by their last report.
    in_flight_elsewhere: int
    #: Prompt tokens of this router's requests.
    tokens: int
    pick_count: int
    weight: float
    running: int
    waiting: int
    #: Time of the last heartbeat, on the board's clock.
    heartbeat_at: float

    @property
    def instance(self) -> Instance:
        return self.handle.instance

    @property
    def up(self) -> bool:
        return self.state in (ReplicaState.UP, ReplicaState.PROBING)

    def order(self) -> tuple[bool, int, str]:
        """Return a sort key: by replica number, replicas without one last."""
        return self.instance.replica is None, self.instance.replica or 0, self.instance.url


class View:
    """Copy of the board, used under its lock. It is outdated once the board's count of changes differs."""

    def __init__(self, memory: BoardMemory, rows: Rows, prefixes: PrefixTable, before: View | None) -> None:
        self._memory = memory
        self._rows = rows
        self._prefixes = prefixes
        self.changes = memory.header[Header.CHANGES]
        count = memory.header[Header.ROWS]
        used = rows.used()
        #: Cell of each row's text; it has a version, so that an equal cell means an equal registration.
        self._texts = {row: memory.text[row] for row in used}
        known = before._texts if before is not None else {}
        self.handles: dict[int, ReplicaHandle] = {}
        for row in used:
            if before is not None and known.get(row) == self._texts[row]:
                self.handles[row] = before.handles[row]
            else:
                self.handles[row] = ReplicaHandle(row, memory.generation[row], memory.read_instance(row))
        counters = [cells for cells in memory.counters[:WORKERS] if cells.pid[0]]
        self.reserved = frozenset(row for row in used if any(cells.reserved[row] for cells in counters))
        #: Rows that may be chosen or are reserved.
        self.usable = [
            row
            for row in used
            if memory.state[row] in (ReplicaState.UP, ReplicaState.PROBING) and not memory.flags[row]
        ]
        self.choosable = [row for row in self.usable if row not in self.reserved]
        self.probing = frozenset(row for row in self.usable if memory.state[row] == ReplicaState.PROBING)
        self._limits = {
            row: handle.instance.max_concurrency
            for row, handle in self.handles.items()
            if handle.instance.max_concurrency is not None
        }
        self._min_limit = min(self._limits.values(), default=_NO_LIMIT)
        #: Fields that do not change with each request, in the order of Candidates.
        self._known = {
            row: (
                *(memory.weight[row], memory.running[row], memory.waiting[row]),
                *(memory.in_flight_at_poll[row], key_of(handle.url)),
            )
            for row, handle in self.handles.items()
        }
        self._known_of_choosable = _transposed(self._known, self.choosable)
        self._own_in_flight = [cells.in_flight[:count] for cells in counters]
        if memory.header[Header.HAS_REMOTE]:
            counters.append(memory.counters[REMOTE])
        self._in_flight = [cells.in_flight[:count] for cells in counters]
        self._tokens = [cells.tokens[:count] for cells in counters]
        self._last_pick = memory.last_pick[:count]

    def choose(
        self, policy: Policy, facts: RequestFacts, exclude: Collection[ReplicaHandle]
    ) -> int | PickFailure:
        """Return the row that the policy chooses."""
        rows = self.choosable
        if exclude:
            rows = [row for row in rows if self.handles[row] not in exclude]
        if not rows:
            will_be_free = any(
                self.handles[row] not in exclude for row in self.usable if row in self.reserved
            )
            return PickFailure.BUSY if will_be_free else PickFailure.DOWN
        in_flight = _sums(self._in_flight)
        if max(in_flight) >= self._min_limit:
            limits = self._limits
            rows = [row for row in rows if row not in limits or in_flight[row] < limits[row]]
        if self.probing:
            rows = [row for row in rows if row not in self.probing or not self._rows.is_probed(row)]
        if not rows:
            return PickFailure.BUSY
        zeros = [0] * len(rows)
        matched: Mapping[int, int] = self._prefixes.match(facts.prefix) if policy.needs_prefix else {}
        known = self._known_of_choosable if rows is self.choosable else _transposed(self._known, rows)
        # By position: keyword arguments would cost as much as all of the arrays.
        candidates = Candidates._make(
            (
                _selected(rows, in_flight),
                _selected(rows, self._last_pick.tolist()),
                _selected(rows, _sums(self._tokens)) if policy.needs_tokens else zeros,
                *known,
                [matched.get(row, 0) for row in rows] if matched else zeros,
            )
        )
        row = rows[policy.choose(candidates, facts)]
        if policy.needs_prefix:
            self._prefixes.insert(facts.prefix, row)
        return row

    def choose_to_reserve(self, exclude: Collection[ReplicaHandle]) -> int | None:
        """Return the row with the fewest requests; None if half of the replicas are reserved already."""
        if len(self.reserved.intersection(self.usable)) >= max(1, len(self.usable) // 2):
            return None
        rows = [row for row in self.choosable if self.handles[row] not in exclude]
        in_flight, last_pick = _sums(self._own_in_flight), self._last_pick
        return min(rows, key=lambda row: (in_flight[row], last_pick[row]), default=None)

    def has_requests(self, row: int) -> bool:
        """Return True if the replica has requests of this router."""
        return any(cells[row] for cells in self._own_in_flight)

    def statuses(self) -> list[Status]:
        memory = self._memory
        own, elsewhere = memory.counters[:WORKERS], memory.counters[REMOTE]
        return [
            Status(
                handle=handle,
                state=ReplicaState(memory.state[row]),
                draining=bool(memory.flags[row] & Flag.DRAINING),
                leaving=bool(memory.flags[row] & Flag.LEAVING),
                reserved=row in self.reserved,
                in_flight=sum(cells.in_flight[row] for cells in own),
                in_flight_elsewhere=elsewhere.in_flight[row],
                tokens=sum(cells.tokens[row] for cells in own),
                pick_count=memory.pick_count[row],
                weight=memory.weight[row],
                running=memory.running[row],
                waiting=memory.waiting[row],
                heartbeat_at=memory.heartbeat_at[row],
            )
            for row, handle in self.handles.items()
        ]


_NO_LIMIT = 1 << 62


def _transposed(known: Mapping[int, tuple[Any, ...]], rows: Sequence[int]) -> list[tuple[Any, ...]]:
    return [*zip(*(known[row] for row in rows), strict=True)]


def _selected(rows: Sequence[int], values: list[int]) -> list[int]:
    """Return the values of `rows`, in their order, out of the values of all rows."""
    return values if len(rows) == len(values) else [values[row] for row in rows]


def _sums(counters: list[memoryview]) -> list[int]:
    """Return the sum over all workers for each row. Each array is read in one call."""
    sums: list[int] = counters[0].tolist()
    for cells in counters[1:]:
        sums = [*map(add, sums, cells.tolist())]
    return sums
