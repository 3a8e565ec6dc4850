"""Children of the test process, forked like gunicorn's workers."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1


class Forked:
    """Runs `work(child)` in a child. Both sides exchange lines of JSON with `send` and `receive`."""

    def __init__(self, work: Callable[[Forked], None]) -> None:
        from_parent, to_child = os.pipe()
        from_child, to_parent = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.close(to_child)
            os.close(from_child)
            self._in, self._out = from_parent, to_parent
            status = 1
            try:
                work(self)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(from_parent)
        os.close(to_parent)
        self._in, self._out = from_child, to_child
        self.status: int | None = None

    def send(self, value: Any) -> None:
        os.write(self._out, json.dumps(value).encode() + b"\n")

    def receive(self, timeout: float = 60.0) -> Any:
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self._in], [], [], timeout)[0], f"process {self.pid} says nothing"
            piece = os.read(self._in, 1)
            if not piece:
                raise EOFError(f"process {self.pid} has ended")
            line += piece
        return json.loads(line)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        if self.status is None:
            os.kill(self.pid, sig)
            self.wait()

    def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
            os.close(self._in)
            os.close(self._out)
        return self.status
