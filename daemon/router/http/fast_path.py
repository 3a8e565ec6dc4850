"""Relays event streams outside the event loop while they contain only ordinary events.

A relay in Python costs two to three times as much as one in C++, nearly all of it for events that need no
decision. Those go through the thread of `fast_path.cc`. Anything else comes back here: the last event, an
error, a client that does not read, a connection that ends.

    replica -> fast_path.cc -> client        data: {...} with its mark, and keep-alive comments
        |
        +-> given back: the marks so far, the bytes not understood, the bytes not sent yet
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

from ....common.errors import ConfigError

logger = logging.getLogger(__name__)

_LIBRARY = Path(__file__).with_name("libfd_fast_path.so")


class Passed(NamedTuple):
    """Result of a stream's time on the fast path, with the bytes that are left to read."""

    #: The mark of each event that was relayed.
    marks: list[bytes]
    #: Bytes of these events.
    size: int
    #: Number of these events that `FastStream.new_events` has not returned yet.
    new_events: int
    #: Further bytes from the replica, for the HTTP parser.
    unread: bytes
    #: Bytes of relayed events, with chunk framing, that the client has not accepted yet.
    unsent: bytes


class Owner(Protocol):
    def given_back(self) -> None:
        """Called when the fast path has stopped: take the stream back."""


class FastPath:
    """The fast path of one event loop, on which all calls are made. It lives as long as the process.

    Args:
        capacity: maximum number of streams; others stay with the event loop.

    Raises:
        OSError: no file descriptor or thread is available.
    """

    def __init__(self, capacity: int) -> None:
        self.native = _library()
        self.handle: int | None = self.native.fd_fast_path_start(capacity)
        if self.handle is None:
            raise OSError(errno.EAGAIN, "cannot start a thread for event streams")
        # By slot; written by the thread.
        self.heard_at = self.native.fd_fast_path_heard_at(self.handle)
        self.events = self.native.fd_fast_path_events(self.handle)
        self.streams: dict[int, FastStream] = {}
        self._wakeup: int = self.native.fd_fast_path_wakeup(self.handle)
        asyncio.get_running_loop().add_reader(self._wakeup, self._collect)

    def take(self, owner: Owner, replica: asyncio.Transport, client: asyncio.Transport) -> FastStream | None:
        """Relay the next events here; None if that is impossible now.

        The replica's transport must be between two chunks, the client's plain TCP with a chunked response in
        progress, and the write buffers of both empty. Do not use them until the stream is taken back.
        """
        numbers = [transport.get_extra_info("socket").fileno() for transport in (replica, client)]
        slot = self.native.fd_fast_path_take(self.handle, *numbers)
        if slot < 0:
            if -slot != errno.ENOSPC:
                logger.warning("cannot relay a stream on the fast path: %s", os.strerror(-slot))
            return None
        for transport in (replica, client):
            transport.pause_reading()
        stream = self.streams[slot] = FastStream(self, slot, owner, replica, client)
        return stream

    def _collect(self) -> None:
        os.read(self._wakeup, 8)
        while (slot := self.native.fd_fast_path_next(self.handle)) >= 0:
            stream = self.streams[slot]
            try:
                stream.owner.given_back()
            except Exception:
                # An error in one stream must not affect the others.
                logger.exception("taking a stream back from the fast path failed; its connections are closed")
                stream.abort()


class FastStream:
    """A stream on the fast path."""

    __slots__ = ("_client", "_counted", "_path", "_replica", "_slot", "owner")

    def __init__(
        self,
        path: FastPath,
        slot: int,
        owner: Owner,
        replica: asyncio.Transport,
        client: asyncio.Transport,
    ) -> None:
        self.owner = owner
        self._path = path
        self._slot = slot
        self._replica = replica
        self._client = client
        self._counted = 0

    @property
    def heard_at(self) -> float:
        """time.monotonic() at which bytes last arrived from the replica."""
        return self._path.heard_at[self._slot]

    def new_events(self) -> int:
        """Return the number of events relayed since the last call."""
        count = self._path.events[self._slot]
        new, self._counted = count - self._counted, count
        return new

    def take_back(self) -> Passed:
        """Return both connections to the event loop, which reads from them again. Call once."""
        path, found = self._path, _GivenBack()
        del path.streams[self._slot]
        path.native.fd_fast_path_take_back(path.handle, self._slot, ctypes.byref(found))
        # Not splitlines(), which also splits at carriage returns.
        marks = bytes(found.marks).split(b"\n")[:-1]
        passed = Passed(marks, found.sent_bytes, self.new_events(), bytes(found.unread), bytes(found.unsent))
        path.native.fd_fast_path_release(path.handle, self._slot)
        for transport in (self._replica, self._client):
            if not transport.is_closing():
                transport.resume_reading()
        return passed

    def abort(self) -> None:
        """Close both connections, which notifies the owner."""
        for transport in (self._replica, self._client):
            transport.abort()


def require() -> None:
    """Check that the compiled library loads.

    Raises:
        ConfigError: it is missing, or built for another machine.
    """
    try:
        _library()
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"the router's compiled library cannot be loaded ({error}); "
            "install fd-dp with pip, which compiles it"
        ) from None


class _Text(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def __bytes__(self) -> bytes:
        return ctypes.string_at(self.data, self.size) if self.size else b""


class _GivenBack(ctypes.Structure):
    _fields_ = (
        *(("marks", _Text), ("unread", _Text), ("unsent", _Text)),
        ("sent_bytes", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL:
    # PyDLL keeps the GIL: the calls are so short that releasing it would cost more.
    library = ctypes.PyDLL(str(_LIBRARY))
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
