"""A daemon with fake replicas in a directory of its own, on free ports; no process may be left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.process import proc

from ..ports import free_ports
from ..waiting import wait_until as _wait_until

LAUNCHER = Path(__file__).with_name("launcher.py")
FDCTL = Path(sys.executable).with_name("fdctl")


wait_until = partial(_wait_until, deadline=40.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Running:
    """The daemon's process, its dp.toml, and fdctl against it."""

    def __init__(self, prefix: Path, launcher: Sequence[str] = ()) -> None:
        """`launcher` is a command prefix that executes the command after it."""
        self.prefix = prefix
        self.launcher = launcher
        self.config = prefix / "dp.toml"
        self.ports = free_ports(26)
        self.metrics_port = self.ports[25]
        self.daemon: subprocess.Popen[str] | None = None
        self.external = False

    def write(
        self,
        replicas: int = 2,
        extra_args: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        router_args: tuple[str, ...] = (),
        **supervise: Any,
    ) -> None:
        supervise = {"backoff_first": 0.1, "probe_interval": 0.2, **supervise}
        lines = [
            '[model]\npath = "demo"',
            f"[parallel]\ndata_parallel_size = {replicas}",
            f"[router]\nport = {self.ports[0]}",
            f"extra_args = {json.dumps(list(router_args))}",
            "[engine]",
            f"ports = {self.ports[1 : 1 + replicas]}",
            f"metrics_ports = {self.ports[9 : 9 + replicas]}",
            f"engine_worker_queue_ports = {self.ports[17 : 17 + replicas]}",
            f"extra_args = {json.dumps(list(extra_args))}",
            "[engine.env]",
            *(f"{key} = {json.dumps(value)}" for key, value in (env or {}).items()),
            f"[metrics]\nport = {self.metrics_port}",
            "[supervise]",
            *(f"{key} = {value}" for key, value in supervise.items()),
        ]
        self.config.write_text("\n".join(lines) + "\n")

    def start(self, *words: str) -> None:
        self.external = "external" in words
        self.daemon = subprocess.Popen(
            [*self.launcher, sys.executable, str(LAUNCHER), str(self.config), str(self.prefix), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": str(self.prefix / "notify")},
        )

    def start_and_wait(self, *words: str) -> None:
        self.start(*words)
        wait_until(self.ready, "everything READY")

    def fdctl(self, *words: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        command = [str(FDCTL), "--prefix", str(self.prefix), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    def status(self) -> dict[str, Any]:
        """Return the status that fdctl would get; an empty one while no daemon answers."""
        try:
            *_, answer = protocol.request(protocol.socket_path(self.prefix / "run"), {"do": "status"}, 20.0)
        except protocol.DaemonUnreachable:
            return {"daemon": {"supervisord": 0}, "router": None, "replicas": []}
        return answer["status"]

    def programs(self) -> dict[str, dict[str, Any]]:
        status = self.status()
        return {entry["name"]: entry for entry in [status["router"], *status["replicas"]] if entry}

    def pids(self) -> dict[str, int]:
        return {name: entry["pid"] for name, entry in self.programs().items()}

    def supervisord(self) -> int:
        """Return the pid of supervisord; 0 while no daemon answers."""
        pid: int = self.status()["daemon"]["supervisord"]
        return pid

    def ready(self) -> bool:
        states = [entry["state"] for entry in self.programs().values()]
        return bool(states) and set(states) == {"READY"}

    def wait_ready_again(self, name: str, old_pid: int) -> dict[str, Any]:
        def again() -> Any:
            entry = self.programs().get(name)
            return entry if entry and entry["state"] == "READY" and entry["pid"] != old_pid else None

        return wait_until(again, f"{name} READY again")

    def tell(self, do: str, **words: Any) -> list[dict[str, Any]]:
        """Return all messages that the daemon answers to a command, the result last."""
        command = {"do": do, "wait": True, **words}
        return [*protocol.request(protocol.socket_path(self.prefix / "run"), command, 60.0)]

    def do(self, do: str, name: str = "", **words: Any) -> None:
        """Send a command without the cost of an fdctl process; it must succeed."""
        assert self.tell(do, name=name, **words)[-1]["code"] == protocol.OK

    def rows(self) -> dict[int, dict[str, Any]]:
        """Return the router's rows by replica number; {} while the router does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/registered", timeout=20) as answer:
                found = json.load(answer)
        except OSError:
            return {}
        return {row["replica"]: row for row in [*found["mixed"], *found["down"]]}

    def drained(self) -> set[int]:
        return {number for number, row in self.rows().items() if row["draining"]}

    def set_in_flight(self, replica: int, requests: int) -> None:
        """Set the number of requests in flight that the fake router reports for the replica."""
        aside = self.prefix / "run" / "in-flight.new"
        aside.write_text(str(requests))
        aside.rename(self.prefix / "run" / f"in-flight-{replica}")

    def stop(self, sig: int = signal.SIGTERM) -> str:
        """Stop the daemon, with all its processes, within the promised 15 s; return its output."""
        assert self.daemon is not None
        supervisord = self.supervisord()
        self.daemon.send_signal(sig)
        output, _ = self.daemon.communicate(timeout=15)
        if sig != signal.SIGKILL and not self.external:
            assert self.left_over() == []
            assert not supervisord or not alive(supervisord)
        return output

    def left_over(self) -> list[proc.Marked]:
        return proc.marked(self.prefix / "run")

    def log(self) -> str:
        return (self.prefix / "logs" / "fd-dp.log").read_text()


def _end(system: Running) -> None:
    if system.daemon is not None and system.daemon.poll() is None:
        system.stop()
    left = system.left_over()
    for process in left:
        os.kill(process.pid, signal.SIGKILL)
    assert left == []


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    system = Running(tmp_path)
    system.write()
    yield system
    _end(system)


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    system = Running(tmp_path_factory.mktemp("shared"))
    system.write()
    system.start_and_wait()
    yield system
    _end(system)


@pytest.fixture
def lent(_shared: Running) -> Iterator[Running]:
    """A running daemon, shared by the tests of a module; it is reset after each test."""
    ports = [*_shared.ports]
    yield _shared
    _shared.ports[:] = ports
    for file in (_shared.prefix / "run").glob("in-flight-*"):
        file.unlink()
    if _shared.daemon is None or _shared.daemon.poll() is not None:
        _shared.start()
    # An operation of a failed test may still be in progress.
    wait_until(lambda: _shared.status()["daemon"]["state"] == "READY", "no operation is under way")
    _shared.write()
    for do in ("undrain", "release", "start"):
        _shared.tell(do, name="all")
    _shared.do("start", "router")
    _shared.do("reload")
    wait_until(lambda: _shared.ready() and not _shared.drained(), "everything is as it was")
