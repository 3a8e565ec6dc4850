"""A daemon that answers every command with what a test has written down, and a terminal to see fdctl on."""

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

#: Given a command, what is sent; a function is called in between.
Script = Callable[[dict[str, Any]], list[dict[str, Any] | Callable[[], object]]]


@contextlib.contextmanager
def scripted(path: Path, script: Script) -> Iterator[list[dict[str, Any]]]:
    """Yields the commands that have come."""
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
        # close() alone would not wake who waits in accept().
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


class Terminal:
    """fdctl on a terminal of 120 columns.

    Args:
        nohup: it is to live on when the terminal is gone.
    """

    def __init__(self, *words: str, nohup: bool = False) -> None:
        self._master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}

        def prepare() -> None:
            # Or Ctrl-C would be a character like others.
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
        """Waits until it has been shown; returns all that was."""
        end = time.monotonic() + deadline
        while not re.search(pattern, text := self._text()):
            assert time.monotonic() < end, f"not within {deadline:g} s: {pattern!r} in {text[-2000:]!r}"
            self._read()
        return text

    def end(self) -> tuple[int, str]:
        """Waits for its end: exit code, and all that was shown."""
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
            return False  # the last who had it open has closed it
        self._output += data
        return bool(data)

    def _text(self) -> str:
        """Without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._output.decode(errors="replace"))
