"""sd_notify: what systemd is told about the daemon. Nothing happens without NOTIFY_SOCKET."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Talks to the service manager that started us, if one did."""

    def __init__(self, environment: dict[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        # "@name" is an abstract socket, whose real first byte is 0.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._status = ""
        self._ready = False
        #: How often `alive` must be called, None if systemd does not watch us.
        self.watchdog: float | None = None
        usec = environment.get("WATCHDOG_USEC", "")
        if usec.isdigit() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog = int(usec) / 2e6

    def ready(self) -> None:
        if not self._ready:
            self._ready = True
            self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Only the main loop calls this: a side thread would vouch for a loop that hangs."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """The start or the reload that is under way may last so much longer, whatever the unit allows."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # systemd may be restarting itself; the next message arrives.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.sendto(message.encode(), self._address)
