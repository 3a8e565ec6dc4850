"""Workers are killed faster than they can restart; no request is refused or altered."""

from __future__ import annotations

import contextlib
import json
import os
import random as entropy
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil
import pytest

from fastdeploy.daemon.control import protocol

from .asks import TEMPLATE, draw_requests
from .conftest import System, wait_until
from .steady_clients import Clients

pytestmark = pytest.mark.e2e

CONFIGURATION = {
    "engine": f"extra_args = {json.dumps(['--chat-template', TEMPLATE])}",
    "supervise": "backoff_first = 0.2\nbackoff_max = 1\nbudget = 1000\nbox_budget = 3\nbox_calm = 10",
}


@dataclass(frozen=True)
class Scale:
    replicas: int
    clients: int
    kills: int
    #: Seconds between two kills.
    pause: float
    #: Shortest and longest stream.
    tokens: tuple[int, int]


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(Scale(3, 12, 6, 1.0, (40, 80)), id="short", marks=pytest.mark.timeout(600)),
        pytest.param(
            Scale(8, 32, 100, 2.0, (60, 200)), id="soak", marks=[pytest.mark.slow, pytest.mark.timeout(0)]
        ),
    ],
)
def test_no_request_is_refused_in_a_storm_of_kills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: Scale
) -> None:
    seed = int(os.environ.get("FD_SOAK_SEED", entropy.randrange(2**32)))
    system = System(tmp_path, scale.replicas, **CONFIGURATION)
    clients = Clients(system.router_port, scale.clients)
    try:
        system.wait_ready()
        clients.learn(draw_requests(Random(6), 2 * scale.clients, scale.tokens))
        with clients.at_work():
            killed = kill_workers(system, Random(seed), scale)
            system.wait_ready()
    finally:
        with capsys.disabled():
            print(f"\n{scale.replicas} replicas, FD_SOAK_SEED={seed}\n{clients.report()}")
        system.stop()
    [log] = tmp_path.glob("logs/**/router.log")
    words = log.read_text(errors="replace")
    assert killed == scale.kills
    assert "ended: from outside" in words
    assert "replicas in a row were lost" not in words
    assert "Traceback" not in words
    # Kills from outside say nothing about the machine: no replica is paused or quarantined.
    assert "QUARANTINED" not in (tmp_path / "fd-dp.out").read_text()


def kill_workers(system: System, chance: Random, scale: Scale) -> int:
    """Kill workers of random READY replicas; return how many."""
    killed = 0
    while killed < scale.kills:
        time.sleep(scale.pause)
        ready = wait_until(lambda: ready_replicas(system), "a replica is READY")
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(chance.choice(ready)).children(recursive=True)
            workers = [each for each in family if "fastdeploy.core.worker" in each.cmdline()]
            for worker in workers:
                worker.kill()
            killed += len(workers)
    return killed


def ready_replicas(system: System) -> list[int]:
    """Return the pids of replicas that are READY."""
    *_, last = protocol.request(protocol.socket_path(system.prefix / "run"), {"do": "status"}, timeout=60)
    return [each["pid"] for each in last["status"]["replicas"] if each["state"] == "READY"]
