"""One machine for all tests, and fd-dp on it with eight fake replicas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from fastdeploy.daemon.control import protocol
from fastdeploy.demo_model import model

from ..waiting import wait_until as _wait_until
from . import booted, installed
from .booted import Machine

wait_until = partial(_wait_until, deadline=60.0)

CONFIG = "/etc/fd/dp.toml"
#: The model cache of this user, with the demo model; read before a fixture sets another.
_MODELS = model.model_cache()


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if reason := booted.why_not():
        pytest.skip(reason)
    if installed.interpreter() is None:
        pytest.skip("this environment's Python lies in a home, and /usr/bin has none of its version")
    found = Machine(tmp_path_factory.mktemp("machine"), installed.shares(_MODELS))
    yield found
    found.close()


class Service:
    """fd-dp.service and fd-dp-engines.service, operated as an operator would."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.run = machine.run
        #: Units with a drop-in.
        self.overridden: set[str] = set()

    def configure(self, replicas: int = 8, *extra_args: str, router: str = "") -> None:
        """Write dp.toml without a reload."""
        lines = [
            f'[model]\npath = "/srv/model"\n[parallel]\ndata_parallel_size = {replicas}\n[router]\n{router}',
            f"[engine]\nextra_args = {json.dumps(extra_args)}\n",
            # With a model cache of the engines' own, fd-dp does not check that the model exists.
            'env = { FD_MODEL_CACHE = "/var/lib/fd/models" }',
            "[supervise]\nparallel_starts = 8\nbackoff_first = 0.1\nprobe_interval = 0.5",
        ]
        self.machine.write(CONFIG, "\n".join(lines) + "\n", 0o640)

    def configuration(self) -> str:
        return (self.machine.root / CONFIG.lstrip("/")).read_text()

    def override(self, unit: str, text: str) -> None:
        """Override settings of a unit by a drop-in."""
        self.overridden.add(unit)
        self.machine.write(f"/etc/systemd/system/{unit}.service.d/test.conf", f"[Service]\n{text}\n")
        self.run("systemctl", "daemon-reload")

    def override_nothing(self) -> None:
        for unit in self.overridden:
            self.run("rm", f"/etc/systemd/system/{unit}.service.d/test.conf")
        self.overridden.clear()
        self.run("systemctl", "daemon-reload")

    def stop(self) -> None:
        """Stop both units, and wait for both."""
        self.run("systemctl", "stop", "fd-dp", "fd-dp-engines")

    def ask(self, **command: str | bool) -> dict[str, Any]:
        """Send the daemon a command as fdctl does; return its last answer, {} while no daemon answers."""
        try:
            *_, answer = protocol.request(self.machine.root / "run/fd/fd-dp.sock", dict(command), 20.0)
        except protocol.DaemonUnreachable:
            return {}
        return answer

    def programs(self) -> dict[str, dict[str, Any]]:
        status = self.ask(do="status").get("status")
        return {entry["name"]: entry for entry in [status["router"], *status["replicas"]]} if status else {}

    def pids(self) -> dict[str, int]:
        return {name: entry["pid"] for name, entry in self.programs().items()}

    def ready(self, count: int = 9) -> bool:
        states = [entry["state"] for entry in self.programs().values()]
        return states == ["READY"] * count

    def wait_ready(self) -> dict[str, int]:
        wait_until(self.ready, "8/8 READY, and the router")
        return self.pids()

    def show(self, what: str, unit: str = "fd-dp") -> str:
        return self.run("systemctl", "show", "-P", what, unit).stdout.strip()

    def processes(self) -> dict[int, str]:
        """Return the command lines of user fd's processes by pid."""
        return self.machine.command_lines("fd")

    def sockets(self) -> set[str]:
        return {file.name for file in (self.machine.root / "run/fd").iterdir() if file.is_socket()}

    def cgroup(self, unit: str) -> set[int]:
        """Return the pids in the unit's cgroup."""
        path = f"/sys/fs/cgroup/system.slice/{unit}.service/cgroup.procs"
        return {int(pid) for pid in self.run("cat", path, code=None).stdout.split()}

    def journal(self, unit: str = "fd-dp") -> str:
        return self.run("journalctl", "-u", unit, "-o", "cat", "--no-pager").stdout


@pytest.fixture(scope="module")
def installed_service(machine: Machine) -> Iterator[Service]:
    service = Service(machine)
    installed.install_environment(machine)
    installed.install_fakes(machine)
    service.configure()
    installed.install(machine)
    for unit in ("fd-dp", "fd-dp-engines"):
        machine.write(f"/etc/systemd/system/{unit}.service.d/quick.conf", "[Service]\nRestartSec=100ms\n")
    machine.run("systemctl", "daemon-reload")
    yield service
    service.stop()
    for unit in ("fd-dp", "fd-dp-engines"):
        machine.run("rm", "-r", f"/etc/systemd/system/{unit}.service.d")


@pytest.fixture
def service(installed_service: Service) -> Iterator[Service]:
    """The service, stopped or running, with the default configuration of `configure`."""
    service = installed_service
    service.configure()
    usual = service.configuration()
    yield service
    # Undo changes, so that the next test does not see them.
    if service.overridden or service.configuration() != usual or not service.ready():
        service.stop()
        service.override_nothing()


@pytest.fixture
def stopped(service: Service) -> Service:
    service.stop()
    return service


@pytest.fixture
def serving(service: Service) -> Service:
    """A running service with eight READY replicas and a READY router."""
    service.run("systemctl", "start", "fd-dp")
    service.wait_ready()
    return service
