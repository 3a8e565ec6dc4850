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

from ....common.errors import ConfigError

logger = logging.getLogger(__name__)

_LIBRARY = Path(__file__).with_name("libfd_fast_path.so")


class Passed(NamedTuple):
    """What has become of a stream since it was taken."""

    #: Those of `resumption`, one of each event that was passed on.
    marks: list[bytes]
    #: Bytes of all these events.
    size: int
    #: How many of them `new_events` has not told yet.
    new_events: int
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
        self.native = _library()
        self.handle: int | None = self.native.fd_fast_path_start(capacity)
        if self.handle is None:
            raise OSError(errno.EAGAIN, "the system does not let the router start a thread for event streams")
        # Of each slot; the thread writes there.
        self.heard_at = self.native.fd_fast_path_heard_at(self.handle)
        self.events = self.native.fd_fast_path_events(self.handle)
        self.streams: dict[int, FastStream] = {}
        self._wakeup: int = self.native.fd_fast_path_wakeup(self.handle)
        asyncio.get_running_loop().add_reader(self._wakeup, self._collect)

    def take(self, owner: Owner, replica: asyncio.Transport, client: asyncio.Transport) -> FastStream | None:
        """Has the events pass from here on. The transports are left alone until the stream is taken back.

        The replica's must be between two chunks, and nothing may be left to be written to either. The
        client's must be plain TCP with a chunked answer under way. None if that cannot be now.
        """
        numbers = [transport.get_extra_info("socket").fileno() for transport in (replica, client)]
        slot = self.native.fd_fast_path_take(self.handle, *numbers)
        if slot < 0:
            if -slot != errno.ENOSPC:
                logger.warning("a stream stays with the event loop: %s", os.strerror(-slot))
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
                # One stream's fault must not hold up those behind it.
                logger.exception(
                    "a stream that came back from the fast path failed; its connections are closed"
                )
                stream.abort()


class FastStream:
    """One that is on the fast path."""

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
        """When bytes last came from the replica, by time.monotonic()."""
        return self._path.heard_at[self._slot]

    def new_events(self) -> int:
        """How many were passed on since the last call."""
        count = self._path.events[self._slot]
        new, self._counted = count - self._counted, count
        return new

    def take_back(self) -> Passed:
        """Both connections are the event loop's again, and it reads from them. To be called once."""
        path, found = self._path, _GivenBack()
        del path.streams[self._slot]
        path.native.fd_fast_path_take_back(path.handle, self._slot, ctypes.byref(found))
        # Not by lines, which could also end at a carriage return.
        marks = bytes(found.marks).split(b"\n")[:-1]
        passed = Passed(marks, found.sent_bytes, self.new_events(), bytes(found.unread), bytes(found.unsent))
        path.native.fd_fast_path_release(path.handle, self._slot)
        for transport in (self._replica, self._client):
            if not transport.is_closing():
                transport.resume_reading()
        return passed

    def abort(self) -> None:
        """Ends both connections; the owner hears of it from them."""
        for transport in (self._replica, self._client):
            transport.abort()


def require() -> None:
    """
    Raises:
        ConfigError: the compiled part is missing, or is for another machine.
    """
    try:
        _library()
    except (OSError, AttributeError) as error:
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
        ("sent_bytes", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL:
    # Its calls are short: who lets others have the interpreter meanwhile only has to wait for it afterwards.
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
