"""Replicas and workers are killed under load, and only requests on a killed worker are lost."""

import asyncio
import os
import random as entropy
import signal
from collections.abc import Callable
from random import Random

import psutil
import pytest

from .asking import Answered, Broken, connect, converse, generation
from .conftest import RouterProcess
from .fake_engine import wait_until
from .kills import PATIENCE, SIGNS, Load
from .replicas import Fleet

LOOKS = ("--health-check-interval-secs", "0.5")


@pytest.mark.parametrize(
    ("workers", "count"),
    [(1, 500), (2, 500), *(pytest.param(n, 10_000, marks=pytest.mark.slow) for n in (1, 2))],
)
@pytest.mark.timeout(1200)
def test_no_request_is_lost_and_no_text_altered_when_replicas_die(
    start_router: Callable[..., RouterProcess], capsys: pytest.CaptureFixture[str], workers: int, count: int
) -> None:
    seed = int(os.environ.get("FD_SOAK_SEED", entropy.randrange(2**32)))
    router = start_router("--workers", str(workers), *LOOKS, *PATIENCE)
    with Fleet(router, 4, SIGNS) as fleet:
        load = Load(router, fleet, Random(seed))
        if count > 1000:
            load.ends = (*load.ends, signal.SIGSTOP)
        try:
            load.run(count)
            # By chance, or on a busy machine, no stream may have been resumed yet.
            while not load.done["streams resumed"]:
                load.run(100)
        except BaseException as error:
            error.add_note(f"FD_SOAK_SEED={seed} has the same requests")
            raise
    assert "Traceback" not in router.log.read_text()
    if count > 1000:
        with capsys.disabled():
            print(f"\n{workers} workers: {dict(load.done)}")


def test_a_worker_that_is_killed_takes_only_its_own_requests_with_it(
    start_router: Callable[..., RouterProcess],
) -> None:
    router = start_router("--workers", "2", *LOOKS)
    with Fleet(router, 2) as fleet:
        for _ in range(2):
            lost, answers = asyncio.run(kill_a_worker(router))
            assert 0 < len(lost) < len(answers)
            for number, answer in enumerate(answers):
                if number in lost:
                    assert isinstance(answer, Broken)
                else:
                    assert isinstance(answer, Answered)
                    answer.check()
            router.wait_idle()
            wait_until(
                lambda: all(replica.is_idle() for replica in fleet.replicas),
                "what the lost worker had asked for is cancelled",
            )
            wait_until(lambda: len(workers_of(router)) == 2, "there is another worker")


async def kill_a_worker(router: RouterProcess) -> tuple[set[int], list[Answered | BaseException]]:
    """Kill a worker in the middle of streams. Returns the indexes of its streams, and the results of all."""
    connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    shares: dict[psutil.Process, set[int]] = {}
    # The accepting worker depends on the kernel and on how busy each worker is.
    while len(connections) < 16 or not all(shares.values()):
        connections += await asyncio.gather(*(connect(router.port) for _ in range(16)))
        ports = [writer.get_extra_info("sockname")[1] for _, writer in connections]
        await asyncio.sleep(0.1)
        shares = {worker: ports_of(worker) & set(ports) for worker in workers_of(router)}
        assert len(connections) < 1000
    streams = [
        asyncio.create_task(converse(*pair, generation(max_tokens=30, interval=0.05, seed=number)))
        for number, pair in enumerate(connections)
    ]
    await asyncio.sleep(0.5)
    worker, theirs = max(shares.items(), key=lambda each: len(each[1]))
    worker.send_signal(signal.SIGKILL)
    answers = await asyncio.gather(*streams, return_exceptions=True)
    return {number for number, port in enumerate(ports) if port in theirs}, answers


def workers_of(router: RouterProcess) -> list[psutil.Process]:
    return psutil.Process(router.process.pid).children()


def ports_of(worker: psutil.Process) -> set[int]:
    """Return the remote ports of a worker's connections, those of its clients among them."""
    return {each.raddr.port for each in worker.net_connections("tcp") if each.raddr}
