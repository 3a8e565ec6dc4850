"""Processes of resumable_engine.py, started, killed and restarted as the daemon does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from fastdeploy.common.resumption import RESUME_PATH

from ..ports import free_ports
from .conftest import RouterProcess
from .fake_engine import wait_until

_ROOT = Path(__file__).parents[2]


class Replica:
    """One replica at a fixed port, whose process is restarted when it dies."""

    def __init__(self, router: RouterProcess, number: int, port: int, *flags: str) -> None:
        self.number = number
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.starts = 0
        #: Start time of the previous process, comparable with the router's log.
        self.previous_start = self._last_start = 0.0
        self._command = [
            *(sys.executable, "-m", "tests.router.resumable_engine", "--port", str(port)),
            *("--router", router.url, "--replica", str(number), "--once", str(router.directory), *flags),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.starts += 1
        self.previous_start, self._last_start = self._last_start, time.time()
        self._process = subprocess.Popen(
            self._command, cwd=_ROOT, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(_ROOT)}
        )

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, sig: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(sig)

    def end(self, sig: int = signal.SIGKILL) -> None:
        self.send(sig)
        if self._process is not None:
            self._process.wait(timeout=20)

    def leave(self) -> None:
        """Stop the process with SIGTERM, and kill it if it hangs."""
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)
        try:
            if self._process is not None:
                self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.end()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = requests.get(f"{self.url}/state", timeout=10).json()
        return state

    def is_idle(self) -> bool:
        """Return True if the replica runs and serves no request; False also during a restart."""
        try:
            return not self.state()["busy"]
        except requests.ConnectionError:
            return False

    def renew(self) -> bool:
        """Make the process appear restarted to the router. Returns False if it is not running."""
        try:
            return requests.get(f"{self.url}/renew", timeout=20).ok
        except requests.ConnectionError:
            return False

    def received(self, path: str) -> list[dict[str, str]]:
        """Return the headers, with lower-case names, of the requests to this path."""
        return [each["headers"] for each in self.state()["received"] if each["path"] == path]

    def delivered(self, identity: str) -> list[int]:
        """Return, for each resumption of this answer, the tokens of the first choice already delivered."""
        return [
            each["delivered"].get("0", 0)
            for each in self.state()["received"]
            if each["path"] == RESUME_PATH and each["headers"]["x-request-id"] == identity
        ]


@contextmanager
def running_fleet(directory: Path, count: int) -> Iterator[Fleet]:
    """Run a fleet behind its own router."""
    router = RouterProcess(directory, "--health-check-interval-secs", "0.2")
    try:
        with Fleet(router, count) as fleet:
            yield fleet
    finally:
        router.stop()


class Fleet:
    """Several replicas. Use it in ``with``, which ends their processes."""

    def __init__(self, router: RouterProcess, count: int, *flags: str, features: str | None = None) -> None:
        self.router = router
        flags = flags if features is None else (*flags, f"--features={features}")
        self.replicas = [
            Replica(router, number, port, *flags) for number, port in enumerate(free_ports(count))
        ]
        #: Whether killed replicas are restarted.
        self.keeps_alive = True
        self._is_ending = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Fleet:
        for replica in self.replicas:
            replica.start()
        self.wait_until_up()
        self._keeper.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_ending.set()
        self._keeper.join()
        for replica in self.replicas:
            replica.leave()

    def __getitem__(self, number: int) -> Replica:
        return self.replicas[number]

    def wait_until_up(self) -> None:
        urls = {replica.url for replica in self.replicas}
        wait_until(lambda: urls <= self.router.urls(), "all replicas are registered")

    def renew(self) -> None:
        """Make all replicas appear restarted, so that the router forgets their failures."""
        for replica in self.replicas:
            wait_until(replica.renew, "the replica runs")
        self.wait_until_up()

    def resumes(self) -> float:
        """Return the router's count of resumptions."""
        return sum(float(line.rpartition(" ")[2]) for line in self.router.metric("fd_router_resumes_total"))

    def _keep(self) -> None:
        while not self._is_ending.wait(0.02):
            for replica in self.replicas:
                if self.keeps_alive and not replica.is_alive:
                    replica.start()
