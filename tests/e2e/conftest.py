"""The whole system as an operator runs it: fd-dp, supervisord, a router and replicas of a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastdeploy.daemon.control import protocol

from ..ports import free_ports
from ..waiting import wait_until as _wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TINY_MODEL = ROOT / "tests" / "fixtures" / "tiny"
#: Environment variable that marks every process of a system, so that orphans can be found as well.
MARKER = "FD_E2E_RUN"


wait_until = partial(_wait_until, deadline=120.0)


def marked_processes(run: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


class System:
    """fd-dp in a directory of its own, on free ports."""

    #: Folder of the commands.
    scripts = BIN

    def __init__(
        self,
        prefix: Path,
        replicas: int,
        model: Path | str = TINY_MODEL,
        parallel: str = "expert_parallel = false",
        engine: str = "",
        supervise: str = "backoff_first = 0.2",
    ) -> None:
        self.prefix = prefix
        self.replicas = replicas
        self.run = uuid.uuid4().hex
        ports = free_ports(3 * replicas + 2)
        self.ports, self.metrics_ports, queue_ports = (
            ports[i * replicas : (i + 1) * replicas] for i in range(3)
        )
        self.router_port, self.metrics_port = ports[-2:]
        self.url = f"http://127.0.0.1:{self.router_port}"
        self.config = prefix / "dp.toml"
        self.config.write_text(
            f"""
[model]
path = "{model}"
served_name = "tiny"

[parallel]
data_parallel_size = {replicas}
{parallel}

[engine]
ports = {self.ports}
metrics_ports = {self.metrics_ports}
engine_worker_queue_ports = {queue_ports}
max_model_len = 512
max_num_seqs = 16
num_gpu_blocks_override = 64
{engine}

[router]
port = {self.router_port}

[metrics]
port = {self.metrics_port}

[supervise]
{supervise}
""",
            encoding="utf-8",
        )
        self.daemon = self.start_daemon()

    def start_daemon(self) -> subprocess.Popen[bytes]:
        with (self.prefix / "fd-dp.out").open("ab") as out:
            self.daemon = subprocess.Popen(
                [str(self.scripts / "fd-dp"), "--config", str(self.config), "--prefix", str(self.prefix)],
                stdout=out,
                stderr=out,
                env={**os.environ, MARKER: self.run},
                start_new_session=True,
            )
        return self.daemon

    def fdctl(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.scripts / "fdctl"), "--prefix", str(self.prefix), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def status(self) -> dict[str, Any] | None:
        """Return the daemon's status without starting fdctl, which would take half a second of CPU time."""
        path = protocol.socket_path(self.prefix / "run")
        try:
            *_, last = protocol.request(path, {"do": "status"}, timeout=60)
        except protocol.DaemonUnreachable:
            return None
        return last.get("status")

    def is_ready(self) -> bool:
        """Return whether every part is READY and the router knows every replica, which may take a heartbeat.

        The daemon notices a death with a delay, so the pid of a READY part must exist as well.
        """
        status = self.status()
        return (
            status is not None
            and all(psutil.pid_exists(part["pid"] or 0) for part in (status["router"], *status["replicas"]))
            and status["router"]["state"] == "READY"
            and [replica["state"] for replica in status["replicas"]] == ["READY"] * self.replicas
            and [replica["in_flight"] for replica in status["replicas"]].count(None) == 0
        )

    def wait_ready(self) -> None:
        try:
            wait_until(self.is_ready, "all replicas and the router READY", deadline=240, pause=0.1)
        except AssertionError as error:
            output = (self.prefix / "fd-dp.out").read_text(errors="replace")[-4000:]
            raise AssertionError(f"{error}\nstatus: {self.status()}\nfd-dp said:\n{output}") from None

    def replica_process(self, replica: int) -> psutil.Process:
        """Return the gunicorn arbiter, which supervisord started."""
        status = self.status()
        assert status is not None
        return psutil.Process(status["replicas"][replica]["pid"])

    def http_process(self, replica: int) -> psutil.Process:
        parent = self.worker_process(replica).parent()
        assert parent is not None
        return parent

    def worker_process(self, replica: int) -> psutil.Process:
        family = self.replica_process(replica).children(recursive=True)
        return next(process for process in family if "fastdeploy.core.worker" in process.cmdline())

    def supervisord(self) -> psutil.Process:
        return next(
            process
            for process in marked_processes(self.run)
            if any(
                Path(word).name == "supervisord" or word == "fastdeploy.daemon.fd_supervisord"
                for word in process.cmdline()
            )
        )

    def processes(self) -> list[psutil.Process]:
        return marked_processes(self.run)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send the daemon a signal, on which it must end within 15 s and leave no process."""
        self.daemon.send_signal(number)
        try:
            assert self.daemon.wait(timeout=15) == 0
            assert self.processes() == []
        finally:
            for process in self.processes():
                process.kill()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("fd"), replicas=8)
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()
