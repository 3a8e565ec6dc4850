"""Processes of `ep_rank`, reused between tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastdeploy.core.cpu_share import SINGLE_THREADED
from fastdeploy.expert_parallel.memory_file import group_directory
from tests.forked import ForkedProcess

from .ep_rank import execute_commands


class RankFailed(Exception):
    """An exception of a rank's command; `kind` is the name of its class."""

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(f"{kind}: {said}")
        self.kind = kind
        self.said = said


class RankProcess:
    def __init__(self) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = ForkedProcess(execute_commands, theirs, env=os.environ | SINGLE_THREADED)
        self._is_ready = self._is_busy = False

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_free(self) -> bool:
        return not self._is_busy and self.process.poll() is None

    def start(self, command: str, **arguments: Any) -> None:
        if not self._is_ready:
            assert self._receive(60) == "ready"
            self._is_ready = True
        self._is_busy = True
        self.link.send(json.dumps({"do": command} | arguments).encode())

    def finish(self, deadline: float) -> Any:
        """Return the answer that ends the command. Raises RankFailed if the command raised."""
        found = self._receive(deadline)
        self._is_busy = False
        return found

    def tell(self, order: str) -> None:
        self.link.send(order.encode())

    def hear(self, deadline: float) -> Any:
        """Return an intermediate answer."""
        return self._receive(deadline)

    @property
    def is_stopped(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.link.close()

    def _receive(self, deadline: float) -> Any:
        self.link.settimeout(deadline)
        try:
            message = self.link.recv(1 << 16)
        except TimeoutError:
            raise AssertionError(f"rank process {self.pid} says nothing within {deadline:g} s") from None
        assert message, f"rank process {self.pid} has died"
        said = json.loads(message)
        if "error" in said:
            self._is_busy = False
            raise RankFailed(said["error"], said["said"])
        return said["answer"]


class Ranks:
    def __init__(self) -> None:
        self._processes: list[RankProcess] = []

    def take(self, count: int) -> list[RankProcess]:
        """Return `count` idle processes, and start those that are missing."""
        for process in self._processes:
            if not process.is_free:
                process.end()
        self._processes = [process for process in self._processes if process.is_free]
        self._processes += [RankProcess() for _ in range(count - len(self._processes))]
        return self._processes[:count]

    def end(self) -> None:
        for process in self._processes:
            process.end()


@contextlib.contextmanager
def repeating(write: Callable[[], None]) -> Iterator[None]:
    """Call `write` continuously in a thread for the duration of the block."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            write()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def group_of_its_own() -> Iterator[str]:
    """Yield an unused group name, and remove the group's files at the end."""
    name = uuid.uuid4().hex
    try:
        yield name
    finally:
        shutil.rmtree(group_directory(name), ignore_errors=True)
