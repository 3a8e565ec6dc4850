"""What lies where in the memory that all ranks of an expert-parallel group map.

    header        what the group is, and its words
    entries       who holds which seat; written under the group's lock
    fingerprint   JSON: what all ranks must agree on
    two records   members and placement of the newest epoch and of the one before; written under the lock
    seats         a part for each, written by the rank in it alone: `custom_ops/include/expert_group.h`

Whoever reads needs no lock for a single word. Nothing here needs Paddle: `fdctl ep` looks at a group that is
running.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

#: Rises with every change of what lies where, and of what it means.
PROTOCOL_VERSION = 2
MOST_SEATS = 64
FINGERPRINT_BYTES = 8192

_PAGE = 4096
_ALIGNMENT = 64
_ROW_BYTES = 128


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes and offsets, in bytes; a pure function of what the ranks agree on. Nothing grows beyond it."""

    num_seats: int
    num_layers: int
    num_experts: int
    #: Of one rank in one collective.
    max_tokens: int
    k: int
    hidden: int

    words = 1024
    entries = _PAGE
    fingerprint = 2 * _PAGE
    records = fingerprint + FINGERPRINT_BYTES

    @property
    def slots_bytes(self) -> int:
        """Of a record's placement: int16 [num_layers, num_experts, num_seats], -1 where there is none."""
        return 2 * self.num_layers * self.num_experts * self.num_seats

    @property
    def record_bytes(self) -> int:
        return _rounded_up(16 + self.slots_bytes, _PAGE)

    @property
    def first_seat(self) -> int:
        return self.records + 2 * self.record_bytes

    # ---- within the part of a seat

    @property
    def expert_token_counts(self) -> int:
        return _ROW_BYTES

    @property
    def dispatch_targets(self) -> int:
        return self.expert_token_counts + _rounded_up(8 * self.num_layers * self.num_experts, _ALIGNMENT)

    @property
    def return_slots(self) -> int:
        return self.dispatch_targets + _rounded_up(4 * self.max_tokens * self.k, _ALIGNMENT)

    @property
    def tokens(self) -> int:
        return _rounded_up(self.return_slots + 4 * self.num_seats * self.max_tokens * self.k, _PAGE)

    @property
    def results(self) -> int:
        return _rounded_up(self.tokens + 4 * self.max_tokens * self.hidden, _PAGE)

    @property
    def seat_bytes(self) -> int:
        """At most: when all seats compute as many tokens as they may, and each wants experts of this seat."""
        rows = self.num_seats * self.max_tokens * self.k
        return _rounded_up(self.results + 4 * rows * self.hidden, _PAGE)

    @property
    def file_bytes(self) -> int:
        return self.first_seat + self.num_seats * self.seat_bytes

    def seat(self, seat: int) -> int:
        return self.first_seat + seat * self.seat_bytes


class Header(ctypes.Structure):
    """The first page, without the words."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        ("version", ctypes.c_uint64),
        ("fingerprint_bytes", ctypes.c_uint64),
        # Of the layout.
        *((field.name, ctypes.c_uint64) for field in fields(Layout)),
        #: Of the process that has the lock, in case it is stopped while it does.
        ("holder", ctypes.c_uint64),
        #: Start time of the holder, as in /proc; written after its pid.
        ("holder_started", ctypes.c_uint64),
        #: Seats that want to join or to leave.
        ("pending", ctypes.c_uint64),
        ("joins", ctypes.c_uint64),
        ("leaves", ctypes.c_uint64),
        ("losses", ctypes.c_uint64),
    )


class GroupWords(ctypes.Structure):
    """Fields and offsets as in `expert_group.h`."""

    _fields_ = (
        ("epoch", ctypes.c_uint64),
        ("_1", ctypes.c_uint64 * 7),
        ("bell", ctypes.c_uint32),
        ("results_bell", ctypes.c_uint32),
        ("_2", ctypes.c_uint32 * 14),
        ("sleepers", ctypes.c_uint64),
        ("_3", ctypes.c_uint64 * 7),
    )


class SeatState:
    """Of an entry: FREE -> JOINING -> ACTIVE -> LEAVING -> FREE; and to FREE from anywhere by death."""

    FREE = 0
    JOINING = 1
    ACTIVE = 2
    LEAVING = 3
    NAMES = ("free", "joining", "active", "leaving")

    @classmethod
    def name_of(cls, number: int) -> str:
        """Return the name of a state, or "unknown" for a number that no rank writes."""
        return cls.NAMES[number] if number < len(cls.NAMES) else "unknown"


class SeatEntry(ctypes.Structure):
    """Who holds a seat."""

    _fields_ = (
        ("state", ctypes.c_uint64),
        ("pid", ctypes.c_uint64),
        #: As in /proc: a pid may be given to another process later.
        ("start_time", ctypes.c_uint64),
        ("_pad", ctypes.c_uint64 * 5),
    )


class SeatRow(ctypes.Structure):
    """What one seat says to the others; fields as in `expert_group.h`."""

    _fields_ = (
        ("arrived", ctypes.c_uint64),
        ("begun", ctypes.c_uint64),
        ("step_tokens", ctypes.c_uint64 * 2),
        ("dispatched", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("combined", ctypes.c_uint64),
        ("phase", ctypes.c_uint64),
        ("layer", ctypes.c_uint64),
        ("since_ns", ctypes.c_uint64),
        ("waiting_for", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("_pad", ctypes.c_uint64 * 4),
    )


def phase_name(number: int) -> str:
    """Return the name of a phase, or "unknown" for a number that no rank writes."""
    return PHASES[number] if number < len(PHASES) else "unknown"


PHASES = (
    "idle",
    "arriving",
    "beginning",
    "computing",
    "sending",
    "sent",
    "experts",
    "returning",
    "returned",
    "combining",
)


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
