"""Clients stream without a pause while everything replaceable is replaced and processes are killed."""

from __future__ import annotations

import json
import os
import random as entropy
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import requests

from .asks import TEMPLATE, draw_requests, stopped_in_the_middle, text_of
from .conftest import System, wait_until
from .disturbance import Disturbance
from .steady_clients import Clients

pytestmark = pytest.mark.e2e

CONFIGURATION = {
    "parallel": "expert_parallel = true",
    "engine": f"extra_args = {json.dumps(['--chat-template', TEMPLATE])}",
    # Repeated kills on purpose must neither exhaust a budget nor lead to long waits.
    "supervise": "backoff_first = 0.2\nbackoff_max = 1\nbudget = 1000000\nbox_budget = 1000000",
}
ENGINE = ("max_num_seqs = 16\n", "max_num_seqs = 24\n")
#: Further kills until an answer was resumed.
_MORE_KILLS = 20
ROUTER = ("[router]\n", '[router]\npolicy = "round_robin"\n')


@dataclass(frozen=True)
class Scale:
    replicas: int
    kills: int
    #: Number of different requests.
    asks: int
    #: Shortest and longest stream.
    tokens: tuple[int, int]
    #: Minutes during which the whole sequence is repeated; 0: once.
    minutes: float = 0.0


SOAK = Scale(8, 20, 60, (60, 200), float(os.environ.get("FD_SOAK_MINUTES", "10")))


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(Scale(3, 3, 16, (40, 80)), id="once", marks=pytest.mark.timeout(900)),
        pytest.param(SOAK, id="soak", marks=[pytest.mark.slow, pytest.mark.timeout(0)]),
    ],
)
def test_no_request_fails_and_no_text_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: Scale
) -> None:
    seed = int(os.environ.get("FD_SOAK_SEED", entropy.randrange(2**32)))
    system = System(tmp_path, scale.replicas, **CONFIGURATION)
    clients = Clients(system.router_port, 32)
    disturbance = Disturbance(system, clients, Random(seed))
    try:
        system.wait_ready()
        learn(clients, scale)
        with clients.at_work():
            go_through_all(system, clients, disturbance, scale)
        wait_until(lambda: nothing_is_in_flight(system), "nothing is in flight")
    finally:
        with capsys.disabled():
            print(f"\n{scale.replicas} replicas, {clients.count} clients, FD_SOAK_SEED={seed}")
            print(f"{clients.report()}\n{disturbance.report()}")
        # No process may be left.
        system.stop()
    assert clients.done["resumed"] > 0
    assert disturbance.lowest_ready["rolling reload"] == scale.replicas - 1
    assert disturbance.lowest_ready["reload of the router"] == scale.replicas
    for log in [*tmp_path.glob("logs/**/router.log"), tmp_path / "fd-dp.out"]:
        assert "Traceback" not in log.read_text(errors="replace")


def go_through_all(system: System, clients: Clients, disturbance: Disturbance, scale: Scale) -> None:
    end = time.monotonic() + 60 * scale.minutes
    engine, router = ENGINE, ROUTER
    while True:
        with disturbance.phase("rolling reload"):
            disturbance.reload(*engine)
        with disturbance.phase("reload of the router"):
            before = router_pid(system)
            disturbance.reload(*router)
            assert router_pid(system) == before
        with disturbance.phase("kills"):
            disturbance.kill(scale.kills)
            # On a busy machine a replica may be lost before it has begun any of its answers.
            while not clients.done["resumed"] and disturbance.kills < scale.kills + _MORE_KILLS:
                disturbance.kill(1)
            system.wait_ready()
        if time.monotonic() > end:
            return
        # The next round changes the settings back.
        engine, router = engine[::-1], router[::-1]


def learn(clients: Clients, scale: Scale) -> None:
    """Learn the undisturbed answers; the requests are fixed, so that runs can be compared."""
    asks = draw_requests(Random(6), scale.asks, scale.tokens)
    said = clients.learn(asks)
    assert any(ord(c) > 127 and c != "\ufffd" for each in said for c in text_of(each)), (
        "characters of several bytes"
    )
    stopped = [stopped_in_the_middle(*pair) for pair in [*zip(asks, said, strict=True)][::6]]
    assert len(set(said)) == len(said)
    for before, after in zip(said[::6], clients.learn(stopped), strict=True):
        assert text_of(before).startswith(text_of(after))


def router_pid(system: System) -> int:
    status = system.status()
    assert status is not None
    return status["router"]["pid"]


def nothing_is_in_flight(system: System) -> bool:
    """Return whether both the router's board and its metrics show no request."""
    known = requests.get(f"{system.url}/registered", timeout=10).json()["mixed"]
    lines = requests.get(f"{system.url}/metrics", timeout=10).text.splitlines()
    counts = [line.rpartition(" ")[2] for line in lines if line.startswith("fd_router_in_flight{")]
    assert len(known) == system.replicas
    return {each["in_flight"] for each in known} | {float(count) for count in counts} == {0}
