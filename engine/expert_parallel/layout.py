"""Layout of the shared memory that all ranks of an expert-parallel group map.

    header        sizes of the group, and its words
    rank slots    the process of each rank; written under the group's lock
    fingerprint   JSON: what all ranks must agree on
    two records   members and placement of the newest epoch and of the one before; written under the lock
    ranks         one part per rank, written by its process only: `custom_ops/include/expert_group.h`

A reader needs no lock for a single word. This module does not import Paddle, because `fdctl ep` reads the
memory of a running group.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

#: Increases with every change of the layout or of its meaning.
PROTOCOL_VERSION = 2
MAX_RANKS = 64
FINGERPRINT_BYTES = 8192

_PAGE = 4096
_ALIGNMENT = 64
_ROW_BYTES = 128


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Sizes of the group, on which all ranks agree, and the offsets in bytes that follow from them."""

    num_ranks: int
    num_layers: int
    num_experts: int
    #: Maximum tokens of one rank in one collective.
    max_tokens: int
    #: Experts per token.
    k: int
    #: Hidden size.
    hidden: int

    #: Offsets within the file.
    words = 1024
    rank_slots = _PAGE
    fingerprint = 2 * _PAGE
    records = fingerprint + FINGERPRINT_BYTES

    @property
    def placement_bytes(self) -> int:
        """Size of a record's placement: int16 slots [num_layers, num_experts, num_ranks]; -1: not placed."""
        return 2 * self.num_layers * self.num_experts * self.num_ranks

    @property
    def record_bytes(self) -> int:
        return _rounded_up(16 + self.placement_bytes, _PAGE)

    @property
    def first_rank_offset(self) -> int:
        return self.records + 2 * self.record_bytes

    # ---- offsets within the part of a rank

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
        return _rounded_up(self.return_slots + 4 * self.num_ranks * self.max_tokens * self.k, _PAGE)

    @property
    def results(self) -> int:
        return _rounded_up(self.tokens + 4 * self.max_tokens * self.hidden, _PAGE)

    @property
    def rank_bytes(self) -> int:
        """Size of a rank's part if all ranks have `max_tokens`, all of them for experts of this rank."""
        rows = self.num_ranks * self.max_tokens * self.k
        return _rounded_up(self.results + 4 * rows * self.hidden, _PAGE)

    @property
    def file_bytes(self) -> int:
        return self.first_rank_offset + self.num_ranks * self.rank_bytes

    def rank_offset(self, rank: int) -> int:
        return self.first_rank_offset + rank * self.rank_bytes


class GroupHeader(ctypes.Structure):
    """The beginning of the file, before `GroupWords`."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        ("version", ctypes.c_uint64),
        ("fingerprint_bytes", ctypes.c_uint64),
        # The layout.
        *((field.name, ctypes.c_uint64) for field in fields(GroupLayout)),
        #: Pid of the process that holds the lock.
        ("holder", ctypes.c_uint64),
        #: Start time of the holder, as in /proc; written after its pid.
        ("holder_started", ctypes.c_uint64),
        #: Bitmap of the ranks that request to join or to leave.
        ("pending", ctypes.c_uint64),
        ("joins", ctypes.c_uint64),
        ("leaves", ctypes.c_uint64),
        ("losses", ctypes.c_uint64),
    )


class GroupWords(ctypes.Structure):
    """Words of the whole group; fields and offsets as in `expert_group.h`."""

    _fields_ = (
        ("epoch", ctypes.c_uint64),
        ("_1", ctypes.c_uint64 * 7),
        ("bell", ctypes.c_uint32),
        ("results_bell", ctypes.c_uint32),
        ("_2", ctypes.c_uint32 * 14),
        ("sleepers", ctypes.c_uint64),
        ("_3", ctypes.c_uint64 * 7),
    )


class RankSlotState:
    """States of a rank slot: FREE -> JOINING -> ACTIVE -> LEAVING -> FREE; any state -> FREE by death."""

    FREE = 0
    JOINING = 1
    ACTIVE = 2
    LEAVING = 3
    NAMES = ("free", "joining", "active", "leaving")

    @classmethod
    def name_of(cls, number: int) -> str:
        """Return the name of a state, or "unknown" for a number that no rank writes."""
        return cls.NAMES[number] if number < len(cls.NAMES) else "unknown"


class RankSlot(ctypes.Structure):
    """Process of a rank."""

    _fields_ = (
        ("state", ctypes.c_uint64),
        ("pid", ctypes.c_uint64),
        #: As in /proc; tells the process from a later one with the same pid.
        ("start_time", ctypes.c_uint64),
        ("_pad", ctypes.c_uint64 * 5),
    )


class RankRow(ctypes.Structure):
    """Progress of one rank, for the others to read; fields as in `expert_group.h`."""

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


#: Names of the values of `Phase` in `expert_group.h`.
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


def phase_name(number: int) -> str:
    """Return the name of a phase, or "unknown" for a number that no rank writes."""
    return PHASES[number] if number < len(PHASES) else "unknown"


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
