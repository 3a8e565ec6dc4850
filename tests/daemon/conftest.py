"""A daemon with fake replicas below a directory of its own, on free ports; nothing may be left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.daemon import control, processes
from fastdeploy.ports import find_free

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

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.config = prefix / "dp.toml"
        self.ports = find_free(16)
        self.daemon: subprocess.Popen[str] | None = None
        self.external = False

    def write(
        self,
        replicas: int = 2,
        extra_args: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        **supervise: Any,
    ) -> None:
        supervise = {"backoff_first": 0.1, "probe_interval": 0.2, **supervise}
        lines = [
            '[model]\npath = "demo"',
            f"[parallel]\ndata_parallel_size = {replicas}",
            f"[router]\nport = {self.ports[0]}",
            "[engine]",
            f"ports = {self.ports[1 : 1 + replicas]}",
            f"metrics_ports = {self.ports[6 : 6 + replicas]}",
            f"engine_worker_queue_ports = {self.ports[11 : 11 + replicas]}",
            f"extra_args = {json.dumps(list(extra_args))}",
            "[engine.env]",
            *(f"{key} = {json.dumps(value)}" for key, value in (env or {}).items()),
            "[supervise]",
            *(f"{key} = {value}" for key, value in supervise.items()),
        ]
        self.config.write_text("\n".join(lines) + "\n")

    def start(self, *words: str) -> None:
        self.external = "external" in words
        self.daemon = subprocess.Popen(
            [sys.executable, str(LAUNCHER), str(self.config), str(self.prefix), *words],
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
        """Asked as fdctl asks; empty while no daemon answers."""
        try:
            *_, answer = control.request(control.socket_path(self.prefix / "run"), {"do": "status"}, 20.0)
        except control.DaemonUnreachable:
            return {"daemon": {"supervisord": 0}, "router": None, "replicas": []}
        return answer["status"]

    def programs(self) -> dict[str, dict[str, Any]]:
        status = self.status()
        return {entry["name"]: entry for entry in [status["router"], *status["replicas"]] if entry}

    def pids(self) -> dict[str, int]:
        return {name: entry["pid"] for name, entry in self.programs().items()}

    def ready(self) -> bool:
        states = [entry["state"] for entry in self.programs().values()]
        return bool(states) and set(states) == {"READY"}

    def wait_ready_again(self, name: str, old_pid: int) -> dict[str, Any]:
        def again() -> Any:
            entry = self.programs().get(name)
            return entry if entry and entry["state"] == "READY" and entry["pid"] != old_pid else None

        return wait_until(again, f"{name} READY again")

    def stop(self, sig: int = signal.SIGTERM) -> str:
        """Returns what the daemon has printed. It has promised to be gone, with everything, within 15 s."""
        assert self.daemon is not None
        supervisord = self.status()["daemon"]["supervisord"]
        self.daemon.send_signal(sig)
        output, _ = self.daemon.communicate(timeout=15)
        if sig != signal.SIGKILL and not self.external:
            assert self.left_over() == []
            assert not supervisord or not alive(supervisord)
        return output

    def left_over(self) -> list[processes.Marked]:
        return processes.marked(self.prefix / "run")

    def log(self) -> str:
        return (self.prefix / "logs" / "fd-dp.log").read_text()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    system = Running(tmp_path)
    system.write()
    yield system
    if system.daemon is not None and system.daemon.poll() is None:
        system.stop()
    left = system.left_over()
    for process in left:
        os.kill(process.pid, signal.SIGKILL)
    assert left == []
