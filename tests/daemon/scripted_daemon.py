"""A daemon that answers each command by a test's script, and a terminal that shows fdctl."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .conftest import FDCTL

#: Returns the messages to send for a command; functions among them are called in turn.
Script = Callable[[dict[str, Any]], list[dict[str, Any] | Callable[[], object]]]


@contextlib.contextmanager
def scripted(path: Path, script: Script) -> Iterator[list[dict[str, Any]]]:
    """Serve the script on the socket `path`; yield the commands received so far."""
    commands: list[dict[str, Any]] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve(peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError, ValueError):
            commands.append(json.loads(peer.makefile("rb").readline()))
            for message in script(commands[-1]):
                if callable(message):
                    message()
                else:
                    peer.sendall(json.dumps(message).encode() + b"\n")

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield commands
    finally:
        # close() alone would not wake the thread in accept().
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


class Terminal:
    """fdctl on a terminal of 120 columns.

    Args:
        nohup: fdctl ignores SIGHUP, as under nohup.
    """

    def __init__(self, *words: str, nohup: bool = False) -> None:
        self._master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}

        def prepare() -> None:
            # Opening the terminal makes it the controlling one; otherwise Ctrl-C would send no SIGINT.
            os.close(os.open(os.ttyname(0), os.O_RDWR))
            if nohup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)

        self.process = subprocess.Popen(
            [str(FDCTL), *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=prepare,
        )
        os.close(slave)
        self._output = b""

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def hang_up(self) -> None:
        os.close(self._master)

    def shows(self, pattern: str, deadline: float = 40.0) -> str:
        """Wait until the output matches; return all output so far."""
        end = time.monotonic() + deadline
        while not re.search(pattern, text := self._text()):
            assert time.monotonic() < end, f"not within {deadline:g} s: {pattern!r} in {text[-2000:]!r}"
            self._read()
        return text

    def end(self) -> tuple[int, str]:
        """Wait for fdctl to exit; return its exit code and all output."""
        end = time.monotonic() + 40.0
        while self.process.poll() is None:
            assert time.monotonic() < end, self._text()[-2000:]
            self._read()
        while self._read():
            pass
        os.close(self._master)
        return self.process.returncode, self._text()

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], 0.1)
        if not ready:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:
            return False  # every process has closed the terminal
        self._output += data
        return bool(data)

    def _text(self) -> str:
        """Return the output without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._output.decode(errors="replace"))
