"""Eight mock replicas and their registration with our router."""

from __future__ import annotations

import json
import subprocess
import threading
import uuid
from types import TracebackType
from typing import Any, Self

import requests

from .native import program

COUNT = 8
_REGISTRATION_SECONDS = 5.0
#: Enough that the router never queues or rejects requests.
_MAX_CONCURRENCY = 4096


class MockEngines:
    """One process that serves eight ports; leaving the context ends it.

    Args:
        interval_ms: the time between two events of a stream.
    """

    def __init__(self, interval_ms: int = 20, count: int = COUNT) -> None:
        self._process = subprocess.Popen(
            [program("mock_engine"), str(count), str(interval_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.ports: list[int] = json.loads(self._process.stdout.readline())
        self._instances = [_instance(port) for port in self.ports]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def stats(self) -> dict[str, Any]:
        """Return requests by engine, the number of streams, and of those requested with marks."""
        answer = requests.get(f"{self.urls[0]}/stats", timeout=10)
        statistics: dict[str, Any] = answer.json()
        return statistics

    def register_with(self, router_url: str) -> None:
        """Register the engines, as replicas do every five seconds.

        Raises:
            requests.RequestException: the router rejects an engine.
        """
        for instance in self._instances:
            answer = requests.post(f"{router_url}/register", json=instance, timeout=10)
            if answer.status_code != 200:
                raise requests.HTTPError(f"POST /register: {answer.status_code} {answer.text}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Heartbeat:
    """Registers engines with a router periodically, in a thread."""

    def __init__(self, engines: MockEngines, router_url: str) -> None:
        self._engines = engines
        self._router_url = router_url
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(_REGISTRATION_SECONDS):
            try:
                self._engines.register_with(self._router_url)
            except requests.RequestException:
                continue  # the requests that it does not serve are counted elsewhere


def _instance(port: int) -> dict[str, Any]:
    return {
        "role": "mixed",
        "host_ip": "127.0.0.1",
        "port": port,
        "version": "3.0",
        "is_paused": False,
        "instance": uuid.uuid4().hex,
        "features": ["resume", "progress"],
        "max_concurrency": _MAX_CONCURRENCY,
        "token": uuid.uuid4().hex,
    }
