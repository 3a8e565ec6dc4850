"""Event streams past the event loop, as long as nothing happens but one event after the other.

A relay in Python costs two to three times what one in C++ does, nearly all of it for events of which there is
nothing to decide. These go through a thread of `fast_path.cc`. Whatever else happens, a last event, an error,
a client that does not read, a connection that ends, comes back here:

    replica -> fast_path.cc -> client        data: {...} with its mark, and signs of life
        |
        +-> given back: the marks so far, what was read and not understood, what was not sent yet
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from ...errors import ConfigError

logger = logging.getLogger(__name__)

_LIBRARY = Path(__file__).with_name("libfd_fast_path.so")


class Passed(NamedTuple):
    """What has become of a stream since it was taken."""

    #: How many events were passed on since that was asked last.
    new_events: int
    #: Those of `resumption`, one of each event that was passed on.
    marks: list[bytes]
    #: Bytes of all these events.
    size: int
    #: What has come from the replica behind them: it is the HTTP parser's.
    unread: bytes
    #: The end of what was passed on, which the client did not take yet, as chunks.
    unsent: bytes


class Owner(Protocol):
    def given_back(self) -> None:
        """The fast path does not go on with the stream: it wants to be taken back."""


class FastPath:
    """Of one event loop, on which all calls are made. It lives as long as the process.

    Args:
        capacity: streams; what is more stays with the event loop.

    Raises:
        OSError: the system has no descriptor or thread for it.
    """

    def __init__(self, capacity: int) -> None:
        self._library = _library()
        self._path = self._library.fd_fast_path_start(capacity)
        if not self._path:
            raise OSError(errno.EAGAIN, "the system does not let the router start a thread for event streams")
        self._wakeup: int = self._library.fd_fast_path_wakeup(self._path)
        self._heard_at = self._library.fd_fast_path_heard_at(self._path)
        self._events = self._library.fd_fast_path_events(self._path)
        self._owners: dict[int, Owner] = {}
        asyncio.get_running_loop().add_reader(self._wakeup, self._look)

    def take(self, owner: Owner, replica: asyncio.Transport, client: asyncio.Transport) -> FastStream | None:
        """Has the events pass from here on. The transports are left alone until the stream is taken back.

        The replica's must be between two chunks, and nothing may be left to be written to the client's, which
        must be plain TCP with a chunked answer under way. None if that cannot be now.
        """
        numbers = [transport.get_extra_info("socket").fileno() for transport in (replica, client)]
        slot = self._library.fd_fast_path_take(self._path, *numbers)
        if slot < 0:
            if -slot != errno.ENOSPC:
                logger.warning("a stream stays with the event loop: %s", os.strerror(-slot))
            return None
        for transport in (replica, client):
            transport.pause_reading()
        self._owners[slot] = owner
        return FastStream(self, slot, replica, client)

    def heard_at(self, slot: int) -> float:
        return self._heard_at[slot]

    def events(self, slot: int) -> int:
        return self._events[slot]

    def take_back(self, slot: int) -> Passed:
        found = _GivenBack()
        del self._owners[slot]
        self._library.fd_fast_path_take_back(self._path, slot, ctypes.byref(found))
        try:
            marks, unread, unsent = (bytes(each) for each in (found.marks, found.unread, found.unsent))
        finally:
            self._library.fd_fast_path_release(self._path, slot)
        return Passed(found.events, marks.splitlines(), found.sent_bytes, unread, unsent)

    def _look(self) -> None:
        os.read(self._wakeup, 8)
        while (slot := self._library.fd_fast_path_next(self._path)) >= 0:
            try:
                self._owners[slot].given_back()
            except Exception:
                # One stream's fault must not hold up those behind it.
                logger.exception("a stream that came back from the fast path failed")


class FastStream:
    """One that is on the fast path."""

    __slots__ = ("_client", "_counted", "_path", "_replica", "_slot")

    def __init__(
        self, path: FastPath, slot: int, replica: asyncio.Transport, client: asyncio.Transport
    ) -> None:
        self._path = path
        self._slot = slot
        self._replica = replica
        self._client = client
        self._counted = 0

    @property
    def heard_at(self) -> float:
        """When bytes last came from the replica, by time.monotonic()."""
        return self._path.heard_at(self._slot)

    def new_events(self) -> int:
        """How many were passed on since the last call."""
        count = self._path.events(self._slot)
        new, self._counted = count - self._counted, count
        return new

    def take_back(self) -> Passed:
        """Both connections are the event loop's again, and it reads from them. To be called once."""
        passed = self._path.take_back(self._slot)
        for transport in (self._replica, self._client):
            if not transport.is_closing():
                transport.resume_reading()
        return passed._replace(new_events=passed.new_events - self._counted)


def require() -> None:
    """
    Raises:
        ConfigError: the compiled part is missing, or is for another machine.
    """
    try:
        _library()
    except OSError as error:
        raise ConfigError(
            f"the router's compiled part does not load ({error}); install fd-dp with pip, which compiles it"
        ) from None


class _Text(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def __bytes__(self) -> bytes:
        return ctypes.string_at(self.data, self.size) if self.size else b""


class _GivenBack(ctypes.Structure):
    _fields_ = (
        *(("marks", _Text), ("unread", _Text), ("unsent", _Text)),
        *(("events", ctypes.c_int64), ("sent_bytes", ctypes.c_int64)),
    )


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_LIBRARY))
    path, slot = ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("start", path, (ctypes.c_int,)),
        ("wakeup", ctypes.c_int, (path,)),
        ("heard_at", ctypes.POINTER(ctypes.c_double), (path,)),
        ("events", ctypes.POINTER(ctypes.c_int64), (path,)),
        ("take", slot, (path, ctypes.c_int, ctypes.c_int)),
        ("next", slot, (path,)),
        ("take_back", None, (path, slot, ctypes.POINTER(_GivenBack))),
        ("release", None, (path, slot)),
    ):
        function = getattr(library, f"fd_fast_path_{name}")
        function.restype, function.argtypes = result, arguments
    return library
