"""Real fd-router processes and engines without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from fastdeploy.ports import find_free

from .fake_engine import FakeEngine, wait_until

FD_ROUTER = Path(sys.executable).with_name("fd-router")


class RouterProcess:
    def __init__(
        self, directory: Path, *flags: str, port: int | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.port = port or find_free(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "router.log"
        self.process = subprocess.Popen(
            [str(FD_ROUTER), "--port", str(self.port), *flags],
            cwd=directory,
            env={**os.environ, "FD_LOG_DIR": str(directory), **(env or {})},
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers, "the router answers")

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=20, **arguments)

    def complete(self, **arguments: Any) -> requests.Response:
        body = {"prompt": "hello", **arguments.pop("body", {})}
        return requests.post(f"{self.url}/v1/completions", json=body, timeout=30, **arguments)

    def add(self, *engines: FakeEngine) -> None:
        for engine in engines:
            answer = engine.register_with(self.url)
            assert answer.status_code == 200, answer.text

    def urls(self, group: str = "mixed") -> set[str]:
        return {entry["url"] for entry in self.get("/registered").json()[group]}

    def in_flight(self) -> dict[str, int]:
        answer = self.get("/registered").json()
        return {entry["url"]: entry["in_flight"] for entry in answer["mixed"] + answer["down"]}

    def wait_idle(self) -> None:
        wait_until(lambda: not any(self.in_flight().values()), "all counts are zero")

    def metric(self, name: str) -> list[str]:
        return [line for line in self.get("/metrics").text.splitlines() if line.startswith(name)]

    def stop(self, sig: int = signal.SIGINT) -> int:
        """Ends it and waits until everything below it has ended too."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(sig)
            self.process.wait(timeout=60)
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive
        return self.process.returncode

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"fd-router ended with {self.process.returncode}"
        try:
            return self.get("/health").status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture
def start_router(tmp_path: Path) -> Iterator[Callable[..., RouterProcess]]:
    routers: list[RouterProcess] = []

    def start(*flags: str, **options: Any) -> RouterProcess:
        routers.append(RouterProcess(tmp_path, *flags, **options))
        return routers[-1]

    yield start
    for router in routers:
        router.stop()


@pytest.fixture
def router(start_router: Callable[..., RouterProcess]) -> RouterProcess:
    return start_router()


@pytest.fixture
def new_engine() -> Iterator[Callable[..., FakeEngine]]:
    engines: list[FakeEngine] = []

    def new(*arguments: Any, **options: Any) -> FakeEngine:
        engines.append(FakeEngine(*arguments, **options))
        return engines[-1]

    yield new
    for engine in engines:
        try:
            engine.stop()
        except OSError:
            continue  # stopped by the test
