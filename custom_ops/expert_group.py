"""ctypes bindings of an expert-parallel group: `include/expert_group.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from .native import library

#: `ExpertGroup::Status`: in progress, or interrupted because the members have changed, a rank has died, the
#: shared memory is full, or a rank has published an impossible value.
GOING, CHANGED, LOST, FULL, FAULTY = range(5)
_MAX_RANKS = 64

#: Arguments: rank, seconds without progress, True if the rank is being killed.
OnStall = Callable[[int, float, bool], None]
_ON_STALL = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_double, ctypes.c_int)


class GroupShape(ctypes.Structure):
    """`GroupShape` of `expert_group.h`."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "rank",
            "num_ranks",
            "num_layers",
            "num_experts",
            "max_tokens",
            "k",
            "hidden",
            "words",
            "first_rank_offset",
            "rank_bytes",
            "expert_token_counts",
            "dispatch_targets",
            "return_slots",
            "tokens",
            "results",
        )
    )


class Counters(ctypes.Structure):
    """`ExpertGroup::Counters`; they count from when the group was opened."""

    _fields_ = (
        ("waited_ns", ctypes.c_uint64 * _MAX_RANKS),
        ("bytes_dispatched", ctypes.c_uint64),
        ("bytes_combined", ctypes.c_uint64),
        ("collectives", ctypes.c_uint64),
    )


class NativeGroup:
    """An open group. Not thread-safe: only the computing thread may use it."""

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
        # Keeps the callback alive as long as the group is open.
        self._on_stall = _ON_STALL(lambda rank, seconds, killed: on_stall(rank, seconds, bool(killed)))
        self._expert_ranks: ctypes.Array[ctypes.c_uint64] | None = None
        self._pidfds: ctypes.Array[ctypes.c_int] | None = None
        self.handle: int = self._library.fd_ep_open(
            ctypes.byref(shape), address, file, self._on_stall, int(stall_after * 1e9), int(stall_kill * 1e9)
        )
        self.counters: Counters = self._library.fd_ep_counters(self.handle).contents

    def set_members(
        self, epoch: int, active: int, expert_ranks: Sequence[int], pidfds: Sequence[int], spin_seconds: float
    ) -> None:
        """Adopt an epoch; see `ExpertGroup::set_members`.

        Args:
            active: bitmap of the members.
            expert_ranks: for each expert of each layer, the bitmap of the members that hold it.
            pidfds: pidfd of each rank; -1 for this one and for ranks that are not members.
        """
        self._expert_ranks = (ctypes.c_uint64 * len(expert_ranks))(*expert_ranks)
        self._pidfds = (ctypes.c_int * len(pidfds))(*pidfds)
        self._library.fd_ep_set_members(
            self.handle, epoch, active, self._expert_ranks, self._pidfds, int(spin_seconds * 1e9)
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
        """Return the rank with the faulty value, and its description; meaningful if the status is FAULTY."""
        return self._library.fd_ep_faulty(self.handle), self._library.fd_ep_fault(self.handle).decode()

    def wake_waiters(self) -> None:
        self._library.fd_ep_ring(self.handle)

    def dispatch(self, layer: int, x: int, topk_ids: int, tokens: int, element: int, rows: int) -> int:
        """Dispatch by memory addresses, without Paddle. Return the number of rows, or -1 if interrupted.

        Args:
            x, topk_ids, rows: addresses; `rows` receives the tokens for this rank's experts.
            element: bytes of an element, 2 or 4.
        """
        return self._library.fd_ep_dispatch(self.handle, layer, x, topk_ids, tokens, element, rows)

    def combine(self, rows: int, count: int, weights: int, tokens: int, element: int, out: int) -> int:
        """Combine by memory addresses, without Paddle. Return -1 if interrupted."""
        return self._library.fd_ep_combine(self.handle, rows, count, weights, tokens, element, out)

    def result_rows(self, rows: int, element: int) -> int:
        """Return the address where a combine uses results without copying them; 0 if memory is full."""
        return self._library.fd_ep_result_rows(self.handle, rows, element) or 0

    def trap(self, phase: int, layer: int, nth: int, signal: int) -> None:
        """Raise `signal` when this phase of this layer is reached for the nth time. For tests."""
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
