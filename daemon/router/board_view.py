"""What a worker keeps of the board until it changes: so a pick reads only what moves with every request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import repeat
from operator import add

from .board_memory import REMOTE, WORKERS, BoardMemory, Flag, Header, State
from .board_rows import Rows, key_of
from .lease import Seat
from .policies import Candidate, Policy, RequestFacts
from .prefix_table import PrefixTable
from .registration import Instance


class Nobody(Enum):
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

    seat: Seat
    state: State
    #: Its operator wants no new requests there; it itself wants none.
    draining: bool
    leaving: bool
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
        return self.seat.instance

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
        self.seats: dict[int, Seat] = {}
        for row in used:
            if before is not None and known.get(row) == self._texts[row]:
                self.seats[row] = before.seats[row]
            else:
                self.seats[row] = Seat(row, memory.generation[row], memory.read_instance(row))
        self.choosable = [
            row for row in used if memory.state[row] in (State.UP, State.PROBING) and not memory.flags[row]
        ]
        self.probing = frozenset(row for row in self.choosable if memory.state[row] == State.PROBING)
        self._limits = {
            row: seat.instance.max_concurrency
            for row, seat in self.seats.items()
            if seat.instance.max_concurrency is not None
        }
        self._least_limit = min(self._limits.values(), default=_NO_LIMIT)
        #: In the order of Candidate's fields from `weight` on; what is matched depends on the request.
        self._known = {
            row: (
                *(memory.weight[row], memory.running[row], memory.waiting[row]),
                *(key_of(seat.instance.url), 0, memory.in_flight_then[row]),
            )
            for row, seat in self.seats.items()
        }
        self._known_of_choosable = _fields(self._known, self.choosable)
        columns = [column for column in memory.columns[:WORKERS] if column.pid[0]]
        if memory.header[Header.HAS_REMOTE]:
            columns.append(memory.columns[REMOTE])
        self._in_flight = [column.in_flight[:count] for column in columns]
        self._tokens = [column.tokens[:count] for column in columns]
        self._last_pick = memory.last_pick[:count]

    def choose(self, policy: Policy, facts: RequestFacts, exclude: Collection[Seat]) -> int | Nobody:
        """A row."""
        rows = self.choosable
        if exclude:
            rows = [row for row in rows if self.seats[row] not in exclude]
        if not rows:
            return Nobody.DOWN
        in_flight = _sums(self._in_flight)
        if max(in_flight) >= self._least_limit:
            limits = self._limits
            rows = [row for row in rows if row not in limits or in_flight[row] < limits[row]]
        if self.probing:
            rows = [row for row in rows if row not in self.probing or not self._rows.is_probed(row)]
        if not rows:
            return Nobody.BUSY
        last_pick = self._last_pick.tolist()
        tokens = _sums(self._tokens) if policy.needs_tokens else None
        fields = (
            [in_flight[row] for row in rows],
            [last_pick[row] for row in rows],
            repeat(0) if tokens is None else [tokens[row] for row in rows],
            *(self._known_of_choosable if rows is self.choosable else _fields(self._known, rows)),
        )
        # Candidate's own constructor takes four times as long.
        candidates = [*map(_make, repeat(Candidate), zip(*fields, strict=False))]
        if not policy.needs_prefix:
            return rows[policy.choose(candidates, facts)]
        matched = self._prefixes.match(facts.prefix)
        candidates = [
            candidate._replace(matched=matched.get(row, 0))
            for row, candidate in zip(rows, candidates, strict=True)
        ]
        row = rows[policy.choose(candidates, facts)]
        self._prefixes.insert(facts.prefix, row)
        return row

    def statuses(self) -> list[Status]:
        memory = self._memory
        own, elsewhere = memory.columns[:WORKERS], memory.columns[REMOTE]
        return [
            Status(
                seat=seat,
                state=State(memory.state[row]),
                draining=bool(memory.flags[row] & Flag.DRAINING),
                leaving=bool(memory.flags[row] & Flag.LEAVING),
                in_flight=sum(column.in_flight[row] for column in own),
                in_flight_elsewhere=elsewhere.in_flight[row],
                tokens=sum(column.tokens[row] for column in own),
                picks=memory.picks[row],
                weight=memory.weight[row],
                running=memory.running[row],
                waiting=memory.waiting[row],
                heard_at=memory.heard_at[row],
            )
            for row, seat in self.seats.items()
        ]


_make = tuple.__new__
_NO_LIMIT = 1 << 62


def _fields(known: Mapping[int, tuple[float, ...]], rows: Sequence[int]) -> list[tuple[float, ...]]:
    """What is known of these rows, field by field."""
    return [*zip(*(known[row] for row in rows), strict=True)]


def _sums(columns: list[memoryview]) -> list[int]:
    """Of each row, over all columns. Each column is read in one go."""
    first, *others = [cells.tolist() for cells in columns]
    for other in others:
        first = [*map(add, first, other)]
    return first
