"""Processes forked from one that has imported the engine; for tests whose subject is not a start.

Importing Paddle takes most of the CPU time of a process that lives for a second. A forked process has its own
pid, signals and exit status. Its parent is not the test process but the one from which it was forked.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# `__main__` as well, or each process would import pytest.
_CONTEXT.set_forkserver_preload(["__main__", f"{__package__}.imported_engine"])


class ForkedProcess:
    """The part of `subprocess.Popen` that the tests use."""

    def __init__(self, target: Callable[..., None], *arguments: Any, env: Mapping[str, str]) -> None:
        """
        Args:
            target: a function of a module; sockets among its arguments are passed on.
            env: the whole environment.
        """
        self._process = _CONTEXT.Process(target=_run, args=(dict(env), target, *arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run(env: dict[str, str], target: Callable[..., None], *arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(env)
    target(*arguments)
