"""Several workers, and one that hangs."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable

from .conftest import RouterProcess
from .fake_engine import FakeEngine, wait_until, waits_for
from .raw_client import POST, RawClient
from .steady_load import requests_counted


def test_a_burst_lands_evenly_however_many_workers_there_are(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    gate = threading.Event()
    router = start_router("--workers", "2")
    engines = [new_engine(replica=number, behaviour=waits_for(gate)) for number in range(8)]
    router.add(*engines)
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        running = [pool.submit(router.complete) for _ in range(64)]
        wait_until(lambda: sum(len(engine.received) for engine in engines) == 64, "all have arrived")
        assert [len(engine.received) for engine in engines] == [8] * 8
        assert set(router.in_flight().values()) == {8}
        gate.set()
        counts = collections.Counter(answer.result().headers["X-FD-Replica"] for answer in running)
    assert counts == {str(number): 8 for number in range(8)}
    router.wait_idle()
    # Every worker reports the sum.
    for _ in range(6):
        wait_until(lambda: requests_counted(router) == 64, "the figures of both workers are added up")


def test_a_worker_that_hangs_is_replaced(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--workers", "2", "--worker-timeout-secs", "3")
    gate = threading.Event()
    engine = new_engine(behaviour=waits_for(gate))
    router.add(engine)
    wait_until(lambda: len(router.workers()) == 2, "both workers run")
    with RawClient(router.port) as client:
        client.send(POST)
        wait_until(lambda: engine.received, "a request is under way")
        hangs = router.worker_of(client)
        hangs.suspend()
        # The other worker serves, and still counts the request of the hanging one.
        assert router.get("/health").status_code == 200
        assert router.in_flight() == {engine.url: 1}
        wait_until(lambda: not hangs.is_running(), "the worker is killed")
        assert client.is_at_its_end()
    gate.set()
    wait_until(lambda: len(router.workers()) == 2, "another has taken its place")
    router.wait_idle()
    assert router.complete().status_code == 200
