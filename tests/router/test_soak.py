"""`make soak`: hours of traffic, killed replicas and departing clients leave nothing behind in the router."""

from __future__ import annotations

import os
import random as entropy
import signal
import time
from collections.abc import Callable
from random import Random

import psutil
import pytest

from .conftest import RouterProcess
from .fake_engine import wait_until
from .kills import PATIENCE, SIGNS, Load
from .replicas import Fleet

#: Seconds of traffic between two measurements.
_ROUND = 20.0
#: Allowed growth of a worker after its first rounds: slack of the allocator, and connections that are kept
#: for a while.
_MOST_BYTES = 24 << 20
_MOST_FILES = 200


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_traffic_leaves_nothing_behind_in_the_router(
    start_router: Callable[..., RouterProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    minutes = float(os.environ.get("FD_SOAK_MINUTES", "10"))
    seed = int(os.environ.get("FD_SOAK_SEED", entropy.randrange(2**32)))
    router = start_router("--workers", "2", *PATIENCE)
    end = time.monotonic() + 60 * minutes
    looks = []
    with Fleet(router, 4, SIGNS) as fleet:
        load = Load(router, fleet, Random(seed), impatient=0.1)
        load.ends = (*load.ends, signal.SIGSTOP)
        while time.monotonic() < end:
            load.run(10**9, _ROUND)
            looks.append([look_at(worker) for worker in psutil.Process(router.process.pid).children()])
        wait_until(lambda: all(replica.is_idle() for replica in fleet.replicas), "nothing is under way")
    with capsys.disabled():
        print(f"\nsoak of {minutes:g} minutes, FD_SOAK_SEED={seed}: {dict(load.done)}")
    assert "Traceback" not in router.log.read_text()
    first, last = looks[min(3, len(looks) - 1)], looks[-1]
    assert [pid for pid, _, _ in first] == [pid for pid, _, _ in last]
    for (_, bytes_then, files_then), (_, bytes_now, files_now) in zip(first, last, strict=True):
        assert bytes_now < bytes_then + _MOST_BYTES
        assert files_now < files_then + _MOST_FILES


def look_at(worker: psutil.Process) -> tuple[int, int, int]:
    """Return the worker's pid, bytes of memory and number of open files."""
    return worker.pid, worker.memory_info().rss, worker.num_fds()
