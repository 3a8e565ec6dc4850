"""The commands of FastDeploy's documentation, as printed there, on other ports and with another model."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ..ports import free_ports
from .conftest import BIN, MARKER, TINY_MODEL, marked_processes, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SERVERS = 8


class Launched:
    """`fd-router` and `multi_api_server`, each started by hand."""

    def __init__(self, directory: Path) -> None:
        self.run = directory.name
        ports = free_ports(2 * SERVERS + 1)
        self.ports, queue_ports, router_port = ports[:SERVERS], ports[SERVERS:-1], ports[-1]
        self.url = f"http://127.0.0.1:{router_port}"
        environment = {**os.environ, MARKER: self.run, "FD_LOG_DIR": str(directory)}
        self.output = directory / "launcher.out"
        self.router = subprocess.Popen([str(BIN / "fd-router"), "--port", str(router_port)], env=environment)
        # Without --metrics-ports, the launcher finds free ones.
        command = f"""
            -m fastdeploy.entrypoints.openai.multi_api_server
            --num-servers {SERVERS}
            --ports {",".join(map(str, self.ports))}
            --args --model {TINY_MODEL}
            --engine-worker-queue-port {",".join(map(str, queue_ports))}
            --tensor-parallel-size 1
            --data-parallel-size {SERVERS}
            --max-model-len 12288
            --max-num-seqs 64
            --num-gpu-blocks-override 256
            --enable-expert-parallel
            --router 0.0.0.0:{router_port}
        """
        with self.output.open("wb") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, *command.split()], env=environment, stdout=output, stderr=output
            )

    def num_registered(self) -> int:
        assert self.launcher.poll() is None, self.output.read_text()[-4000:]
        try:
            return int(requests.get(f"{self.url}/registered_number", timeout=5).json()["mixed"])
        except requests.ConnectionError:
            return 0

    def stop(self) -> None:
        for process in (self.launcher, self.router):
            process.terminate()
        try:
            for process in (self.launcher, self.router):
                process.wait(timeout=60)
            assert marked_processes(self.run) == []
        finally:
            for leftover in marked_processes(self.run):
                leftover.kill()


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    started = Launched(tmp_path)
    try:
        wait_until(lambda: started.num_registered() == SERVERS, "eight replicas register", deadline=240)
        yield started
    finally:
        started.stop()


def test_router_and_eight_servers_answer_and_end_together(launched: Launched) -> None:
    def complete(number: int) -> requests.Response:
        body = {"prompt": f"request {number}", "max_tokens": 32, "ignore_eos": True}
        return requests.post(f"{launched.url}/v1/completions", json=body, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(complete, range(32)))

    assert [answer.status_code for answer in answers] == [200] * 32
    assert len({answer.headers["X-FD-Replica"] for answer in answers}) == SERVERS
    launched.launcher.send_signal(signal.SIGTERM)
    assert launched.launcher.wait(timeout=60) == 0
    launched.router.terminate()
    assert launched.router.wait(timeout=30) == 0
    assert marked_processes(launched.run) == []
