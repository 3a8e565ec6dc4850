"""The compiled side of an expert-parallel group: `include/expert_group.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from .native import library

GOING, CHANGED, LOST, FULL, FAULTY = range(5)
_MOST_SEATS = 64

#: seat, seconds without progress, whether it is killed now.
OnStall = Callable[[int, float, bool], None]
_ON_STALL = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_double, ctypes.c_int)


class GroupShape(ctypes.Structure):
    """`GroupShape` of `expert_group.h`."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "seat",
            "num_seats",
            "num_layers",
            "num_experts",
            "max_tokens",
            "k",
            "hidden",
            "words",
            "first_seat",
            "seat_bytes",
            "served",
            "targets",
            "places",
            "tokens",
            "results",
        )
    )


class Counters(ctypes.Structure):
    """`ExpertGroup::Counters`: since the group was opened."""

    _fields_ = (
        ("waited_ns", ctypes.c_uint64 * _MOST_SEATS),
        ("bytes_dispatched", ctypes.c_uint64),
        ("bytes_combined", ctypes.c_uint64),
        ("collectives", ctypes.c_uint64),
    )


class NativeGroup:
    """One open group. Not thread-safe: it belongs to the thread that computes."""

    def __init__(
        self,
        shape: GroupShape,
        address: int,
        file: int,
        on_stall: OnStall,
        stall_after: float,
        stall_kill: float,
    ) -> None:
        self._library = _declared(library())
        # Kept: what C calls must live as long as the group.
        self._on_stall = _ON_STALL(lambda seat, seconds, killed: on_stall(seat, seconds, bool(killed)))
        self._homes: ctypes.Array[ctypes.c_uint64] | None = None
        self._pidfds: ctypes.Array[ctypes.c_int] | None = None
        self.handle: int = self._library.fd_ep_open(
            ctypes.byref(shape), address, file, self._on_stall, int(stall_after * 1e9), int(stall_kill * 1e9)
        )
        self.counters: Counters = self._library.fd_ep_counters(self.handle).contents

    def set_members(
        self, epoch: int, active: int, homes: Sequence[int], pidfds: Sequence[int], spin_seconds: float
    ) -> None:
        """See `ExpertGroup::set_members`."""
        self._homes = (ctypes.c_uint64 * len(homes))(*homes)
        self._pidfds = (ctypes.c_int * len(pidfds))(*pidfds)
        self._library.fd_ep_set_members(
            self.handle, epoch, active, self._homes, self._pidfds, int(spin_seconds * 1e9)
        )

    def arrive(self) -> int:
        return self._library.fd_ep_arrive(self.handle)

    def announce(self, tokens: int) -> None:
        self._library.fd_ep_announce(self.handle, tokens)

    def begin(self) -> int:
        return self._library.fd_ep_begin(self.handle)

    @property
    def busy(self) -> bool:
        return bool(self._library.fd_ep_busy(self.handle))

    @property
    def status(self) -> int:
        return self._library.fd_ep_status(self.handle)

    @property
    def lost(self) -> int:
        return self._library.fd_ep_lost(self.handle)

    @property
    def missing_bytes(self) -> int:
        return self._library.fd_ep_missing_bytes(self.handle)

    @property
    def fault(self) -> tuple[int, str]:
        """After FAULTY: the seat whose part of the memory is faulty, and the value that is out of range."""
        return self._library.fd_ep_faulty(self.handle), self._library.fd_ep_fault(self.handle).decode()

    def ring(self) -> None:
        self._library.fd_ep_ring(self.handle)

    def dispatch(self, layer: int, x: int, picks: int, tokens: int, element: int, rows: int) -> int:
        """A dispatch without Paddle, by addresses: the number of rows, or -1 if the group was interrupted."""
        return self._library.fd_ep_dispatch(self.handle, layer, x, picks, tokens, element, rows)

    def combine(self, rows: int, count: int, weights: int, tokens: int, element: int, out: int) -> int:
        """A combine without Paddle, by addresses. Returns -1 if the group was interrupted."""
        return self._library.fd_ep_combine(self.handle, rows, count, weights, tokens, element, out)

    def result_rows(self, rows: int, element: int) -> int:
        """Where results lie that the combine need not copy; 0 if there is no room for so many."""
        return self._library.fd_ep_result_rows(self.handle, rows, element) or 0

    def trap(self, phase: int, layer: int, nth: int, signal: int) -> None:
        """For tests: the process sends itself `signal` when it comes to this phase of this layer again."""
        self._library.fd_ep_trap(self.handle, phase, layer, nth, signal)

    def close(self) -> None:
        self._library.fd_ep_close(self.handle)


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "open": (number, [ctypes.POINTER(GroupShape), pointer, ctypes.c_int, _ON_STALL, number, number]),
        "close": (None, [number]),
        "set_members": (None, [number, ctypes.c_uint64, ctypes.c_uint64, pointer, pointer, number]),
        "arrive": (ctypes.c_int, [number]),
        "announce": (None, [number, ctypes.c_int]),
        "begin": (ctypes.c_int, [number]),
        "busy": (ctypes.c_int, [number]),
        "status": (ctypes.c_int, [number]),
        "lost": (ctypes.c_uint64, [number]),
        "missing_bytes": (number, [number]),
        "faulty": (ctypes.c_int, [number]),
        "fault": (ctypes.c_char_p, [number]),
        "ring": (None, [number]),
        "counters": (ctypes.POINTER(Counters), [number]),
        "dispatch": (
            ctypes.c_int,
            [number, ctypes.c_int, pointer, pointer, ctypes.c_int, ctypes.c_int, pointer],
        ),
        "combine": (
            ctypes.c_int,
            [number, pointer, ctypes.c_int, pointer, ctypes.c_int, ctypes.c_int, pointer],
        ),
        "result_rows": (pointer, [number, ctypes.c_int, ctypes.c_int]),
        "trap": (None, [number, *[ctypes.c_int] * 4]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, f"fd_ep_{name}")
        function.restype, function.argtypes = result, arguments
    return found
