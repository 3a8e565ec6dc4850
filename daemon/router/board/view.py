"""What a worker keeps of the board until it changes: so a pick reads only what moves with every request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from operator import add
from typing import Any

from ..instance import Instance, ReplicaHandle
from ..policy.policy import Candidates, Policy, RequestFacts
from ..policy.prefix_table import PrefixTable
from .memory import REMOTE, WORKERS, BoardMemory, Flag, Header, State
from .rows import Rows, key_of


class PickFailure(Enum):
    """Why no replica was picked. False, where a lease is true."""

    #: None may be chosen.
    DOWN = auto()
    #: Each that may be chosen has as many requests as it takes.
    BUSY = auto()

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Status:
    """A replica as it was at one moment."""

    handle: ReplicaHandle
    state: State
    #: Its operator wants no new requests there; it itself wants none.
    draining: bool
    leaving: bool
    #: It gets no new requests until a request that may kill replicas has been tried there alone.
    reserved: bool
    #: Of this router's requests, and what other routers said last of theirs.
    in_flight: int
    in_flight_elsewhere: int
    #: Prompt tokens of this router's requests.
    tokens: int
    picks: int
    weight: float
    running: int
    waiting: int
    #: When its last heartbeat came, on the board's clock.
    heard_at: float

    @property
    def instance(self) -> Instance:
        return self.handle.instance

    @property
    def up(self) -> bool:
        """Whether it works, as far as anybody knows."""
        return self.state in (State.UP, State.PROBING)

    def order(self) -> tuple[bool, int, str]:
        """By replica numbers; those without one come last."""
        return self.instance.replica is None, self.instance.replica or 0, self.instance.url


class View:
    """Made and used under the board's lock. Out of date as soon as the board's count of changes has moved."""

    def __init__(self, memory: BoardMemory, rows: Rows, prefixes: PrefixTable, before: View | None) -> None:
        self._memory = memory
        self._rows = rows
        self._prefixes = prefixes
        self.changes = memory.header[Header.CHANGES]
        count = memory.header[Header.ROWS]
        used = rows.used()
        #: By the text that a row had, which never has the same version twice.
        self._texts = {row: memory.text[row] for row in used}
        known = before._texts if before is not None else {}
        self.handles: dict[int, ReplicaHandle] = {}
        for row in used:
            if before is not None and known.get(row) == self._texts[row]:
                self.handles[row] = before.handles[row]
            else:
                self.handles[row] = ReplicaHandle(row, memory.generation[row], memory.read_instance(row))
        columns = [column for column in memory.columns[:WORKERS] if column.pid[0]]
        self.reserved = frozenset(row for row in used if any(column.reserved[row] for column in columns))
        #: Rows that may be chosen, and those that are reserved.
        self.usable = [
            row for row in used if memory.state[row] in (State.UP, State.PROBING) and not memory.flags[row]
        ]
        self.choosable = [row for row in self.usable if row not in self.reserved]
        self.probing = frozenset(row for row in self.usable if memory.state[row] == State.PROBING)
        self._limits = {
            row: handle.instance.max_concurrency
            for row, handle in self.handles.items()
            if handle.instance.max_concurrency is not None
        }
        self._least_limit = min(self._limits.values(), default=_NO_LIMIT)
        #: In the order of Candidates' columns: what does not move with every request.
        self._known = {
            row: (
                *(memory.weight[row], memory.running[row], memory.waiting[row]),
                *(memory.in_flight_then[row], key_of(handle.url)),
            )
            for row, handle in self.handles.items()
        }
        self._known_of_choosable = _columns(self._known, self.choosable)
        self._own_in_flight = [column.in_flight[:count] for column in columns]
        if memory.header[Header.HAS_REMOTE]:
            columns.append(memory.columns[REMOTE])
        self._in_flight = [column.in_flight[:count] for column in columns]
        self._tokens = [column.tokens[:count] for column in columns]
        self._last_pick = memory.last_pick[:count]

    def choose(
        self, policy: Policy, facts: RequestFacts, exclude: Collection[ReplicaHandle]
    ) -> int | PickFailure:
        """A row."""
        rows = self.choosable
        if exclude:
            rows = [row for row in rows if self.handles[row] not in exclude]
        if not rows:
            will_be_free = any(
                self.handles[row] not in exclude for row in self.usable if row in self.reserved
            )
            return PickFailure.BUSY if will_be_free else PickFailure.DOWN
        in_flight = _sums(self._in_flight)
        if max(in_flight) >= self._least_limit:
            limits = self._limits
            rows = [row for row in rows if row not in limits or in_flight[row] < limits[row]]
        if self.probing:
            rows = [row for row in rows if row not in self.probing or not self._rows.is_probed(row)]
        if not rows:
            return PickFailure.BUSY
        nothing = [0] * len(rows)
        matched: Mapping[int, int] = self._prefixes.match(facts.prefix) if policy.needs_prefix else {}
        known = self._known_of_choosable if rows is self.choosable else _columns(self._known, rows)
        # By position: names would cost as much as all of the columns do.
        candidates = Candidates._make(
            (
                _of(rows, in_flight),
                _of(rows, self._last_pick.tolist()),
                _of(rows, _sums(self._tokens)) if policy.needs_tokens else nothing,
                *known,
                [matched.get(row, 0) for row in rows] if matched else nothing,
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
        return any(column[row] for column in self._own_in_flight)

    def statuses(self) -> list[Status]:
        memory = self._memory
        own, elsewhere = memory.columns[:WORKERS], memory.columns[REMOTE]
        return [
            Status(
                handle=handle,
                state=State(memory.state[row]),
                draining=bool(memory.flags[row] & Flag.DRAINING),
                leaving=bool(memory.flags[row] & Flag.LEAVING),
                reserved=row in self.reserved,
                in_flight=sum(column.in_flight[row] for column in own),
                in_flight_elsewhere=elsewhere.in_flight[row],
                tokens=sum(column.tokens[row] for column in own),
                picks=memory.picks[row],
                weight=memory.weight[row],
                running=memory.running[row],
                waiting=memory.waiting[row],
                heard_at=memory.heard_at[row],
            )
            for row, handle in self.handles.items()
        ]


_NO_LIMIT = 1 << 62


def _columns(known: Mapping[int, tuple[Any, ...]], rows: Sequence[int]) -> list[tuple[Any, ...]]:
    return [*zip(*(known[row] for row in rows), strict=True)]


def _of(rows: Sequence[int], values: list[int]) -> list[int]:
    """Those of some rows, in their order, out of those of all."""
    return values if len(rows) == len(values) else [values[row] for row in rows]


def _sums(columns: list[memoryview]) -> list[int]:
    """Of each row, over all columns. Each column is read in one go."""
    sums: list[int] = columns[0].tolist()
    for cells in columns[1:]:
        sums = [*map(add, sums, cells.tolist())]
    return sums
