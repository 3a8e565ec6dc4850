"""sd_notify: reports the daemon's state to systemd. Does nothing without NOTIFY_SOCKET."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sends notifications to the service manager, if one started the daemon."""

    def __init__(self, environment: dict[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        # "@name" is an abstract socket: its first byte is 0.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._status = ""
        self._ready = False
        #: Seconds between calls of `alive`; None if systemd's watchdog is off.
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
        """Reset the watchdog. Call this only in the main loop: a thread would hide a loop that hangs."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Extend the timeout of the start or reload in progress by some seconds."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # systemd may be restarting; a later message will arrive.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.sendto(message.encode(), self._address)
