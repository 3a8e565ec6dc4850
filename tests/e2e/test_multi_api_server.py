"""The launcher with two real replicas of a tiny model: how it ends, and that no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from ..ports import free_ports
from .conftest import MARKER, TINY_MODEL, marked_processes, wait_until

pytestmark = pytest.mark.e2e


class Launcher:
    """multi_api_server as a child, with its log in a file and all of its descendants marked."""

    def __init__(self, directory: Path) -> None:
        self.run = uuid.uuid4().hex
        self.ports = free_ports(2)
        self.log = directory / "launcher.log"
        command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.multi_api_server"]
        command += ["--num-servers", "2", "--ports", ",".join(map(str, self.ports))]
        command += ["--args", "--model", str(TINY_MODEL), "--threads", "1", "--device", "cpu"]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, MARKER: self.run, "FD_LOG_DIR": str(directory / "log")},
                stdout=output,
                stderr=output,
            )

    def wait_until_ready(self) -> None:
        for port in self.ports:
            wait_until(lambda port=port: self.answers(port), f"the server on port {port} is ready")

    def answers(self, port: int) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def server(self, index: int) -> psutil.Process:
        """Return the api_server of a replica."""
        found = [
            child
            for child in psutil.Process(self.process.pid).children()
            if f"--local-data-parallel-id={index}" in child.cmdline()
        ]
        assert len(found) == 1
        return found[0]

    def wait_until_nothing_is_left(self) -> None:
        wait_until(lambda: not marked_processes(self.run), "all processes have ended")


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    if launcher.process.poll() is None:
        launcher.process.kill()
        launcher.process.wait()
    launcher.wait_until_nothing_is_left()


def test_both_servers_answer_and_log_apart_and_sigterm_ends_them(launcher: Launcher, tmp_path: Path) -> None:
    launcher.wait_until_ready()
    for index, port in enumerate(launcher.ports):
        body = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
        answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert (tmp_path / "log" / f"log_{index}" / "api_server.log").exists()
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.process.wait(60) == 0
    assert not marked_processes(launcher.run)


def test_sigint_while_servers_are_loading_ends_them(launcher: Launcher) -> None:
    wait_until(lambda: "server 1: started" in launcher.log.read_text(), "both servers are started")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.process.wait(60) == 130
    assert not marked_processes(launcher.run)
    assert "Traceback" not in launcher.log.read_text()


def test_a_server_that_dies_is_named_and_the_rest_is_ended(launcher: Launcher) -> None:
    launcher.wait_until_ready()
    victim = launcher.server(1)
    victim.kill()
    assert launcher.process.wait(60) == 1
    launcher.wait_until_nothing_is_left()
    named = f"server 1 (port {launcher.ports[1]}, pid {victim.pid}) was killed by SIGKILL"
    assert sum(named in line for line in launcher.log.read_text().splitlines()) == 1


def test_a_launcher_that_is_killed_leaves_nothing(launcher: Launcher) -> None:
    launcher.wait_until_ready()
    assert len(marked_processes(launcher.run)) > 3
    launcher.process.kill()
    launcher.process.wait()
    launcher.wait_until_nothing_is_left()
