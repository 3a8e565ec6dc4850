"""Requests that kill their replicas, and innocent requests on the same replicas. Real processes die."""

from __future__ import annotations

import asyncio
import concurrent.futures
import datetime
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from fastdeploy.daemon.router.relay.suspicion import SUSPECT_AFTER
from fastdeploy.daemon.supervision.router_client import ReplicaExit, registered, report_exit

from .asking import Answered, ask, asking, generation
from .conftest import RouterProcess
from .fake_engine import wait_until
from .generation import Generation
from .raw_client import RawClient
from .replicas import Fleet, Replica

LOOKS = ("--health-check-interval-secs", "0.5")
#: Deaths caused by a deadly request: the last one while it has a replica to itself.
MOST_DEATHS = SUSPECT_AFTER + 1
#: Faults before the first token, and in the middle of the answer.
DEADLY = {
    "at once": [{"at": "head", "how": "kill", "times": 99}],
    "in the middle": [
        {"at": "event", "event": 2, "how": "kill"},
        {"at": "resume", "how": "kill", "times": 99},
    ],
}


def innocents(count: int) -> list[Generation]:
    """Return requests too slow to end before a replica's reservation moves them elsewhere."""
    return [
        generation(max_tokens=45, interval=0.05, seed=seed)
        if seed % 4
        else generation(stream=False, max_tokens=45, interval=0.05, drafts=45, seed=seed)
        for seed in range(count)
    ]


@pytest.mark.parametrize("kind", DEADLY)
def test_deadly_request_ends_with_an_error_and_harms_no_other(
    start_router: Callable[..., RouterProcess], kind: str
) -> None:
    router = start_router("--workers", "2", *LOOKS)
    deadly = generation(max_tokens=20, faults=DEADLY[kind])

    async def all_at_once() -> tuple[Answered, list[Answered]]:
        others = [asyncio.create_task(asking(router.port, each)) for each in innocents(24)]
        # A request without a replica is rejected unless it has been at one already.
        while sum(router.in_flight().values()) < len(others):
            await asyncio.sleep(0.02)
        return await asking(router.port, deadly, "deadly"), await asyncio.gather(*others)

    with Fleet(router, 4) as fleet:
        told, answers = asyncio.run(all_at_once())
        for answer in answers:
            answer.check()
        assert sum(replica.starts - 1 for replica in fleet.replicas) == MOST_DEATHS
    message = told.error["message"]
    assert message.startswith(
        f"request deadly: {MOST_DEATHS} replicas in a row were lost while serving this request"
    )
    if kind == "at once":
        assert (told.status, told.error["code"]) == (500, "replicas_lost")
        assert told.headers["x-should-retry"] == "false"
    else:
        assert (told.status, told.error["code"]) == (200, "replica_lost")
    log = router.log.read_text()
    assert "is reserved for another request, resuming" in log
    assert "Traceback" not in log
    # The last death lost no other request.
    failed = [line for line in log.splitlines() if "failed, trying another" in line]
    # A replica that is just restarting may refuse connections, then the key of its predecessor. No
    # request is lost.
    lost = [line for line in failed if "no connection" not in line and "answered 401" not in line]
    # The router may notice the last death when it connects again.
    *_, last = [line for line in failed if "request=deadly" in line]
    last_replica = fleet[replica_in(last)]
    # The previous death is logged near the replica's restart, which takes longer than the logging.
    between = (last_replica.previous_start + second_of(last)) / 2
    since = [line for line in lost if replica_in(line) == last_replica.number and second_of(line) > between]
    assert [line for line in since if "request=deadly" not in line] == []


def replica_in(line: str) -> int:
    return int(line.partition("replica=")[2].partition(" ")[0])


def second_of(line: str) -> float:
    return datetime.datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def test_request_that_kills_only_the_worker_is_deadly_too(
    start_router: Callable[..., RouterProcess],
) -> None:
    """The API process outlives its worker and answers 503."""
    router = start_router(*LOOKS)
    fault = {"at": "head", "how": "lost", "times": 99}
    with Fleet(router, 5):
        answer = ask(router.port, generation(faults=[fault]), "loses")
    assert (answer.status, answer.error["code"]) == (500, "replicas_lost")
    assert len(list(router.directory.glob("loses-*"))) == MOST_DEATHS


# ---- with reports of fd-dp


@pytest.fixture
def told_router(start_router: Callable[..., RouterProcess], tmp_path: Path) -> RouterProcess:
    """A router that receives reports of how its replicas ended."""
    router: RouterProcess = start_router("--admin-socket", str(tmp_path / "admin"), *LOOKS)
    return router


def test_single_replica_is_reserved_for_a_suspect_while_others_wait(told_router: RouterProcess) -> None:
    """A supervised router lets new requests wait until the replica is back."""
    faults = [{"at": "head", "how": "kill", "times": SUSPECT_AFTER}]
    with Fleet(told_router, 1) as fleet, concurrent.futures.ThreadPoolExecutor(4) as pool:
        suspect = pool.submit(ask, told_router.port, generation(faults=faults))
        others = [pool.submit(ask, told_router.port, each) for each in innocents(3)]
        for answer in (suspect, *others):
            answer.result().check()
        assert fleet[0].starts == 1 + SUSPECT_AFTER


def kill_from_outside(router: RouterProcess, replica: Replica) -> None:
    """Kill the replica, and report the exit as fd-dp does."""
    instance = registered(router.directory / "admin")[replica.port].instance
    replica.end(signal.SIGKILL)
    report_exit(router.directory / "admin", ReplicaExit(replica.url, instance, from_outside=True))


def holder(fleet: Fleet) -> Replica | None:
    def is_busy(replica: Replica) -> bool:
        try:
            return bool(replica.state()["busy"])
        except requests.RequestException:
            return False

    return next((replica for replica in fleet.replicas if is_busy(replica)), None)


def test_an_innocent_request_outlives_kills_from_outside(told_router: RouterProcess) -> None:
    """There are more kills from outside than deaths that make a request deadly."""
    request = generation(max_tokens=3, delay=1.5)
    with Fleet(told_router, 3) as fleet, concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, told_router.port, request)
        for _ in range(MOST_DEATHS + 1):
            replica = wait_until(lambda: holder(fleet), "a replica has it")
            starts = replica.starts
            kill_from_outside(told_router, replica)
            wait_until(lambda: replica.starts > starts, "another one is started")  # noqa: B023
            fleet.wait_until_up()
        answer.result().check()


def test_report_of_a_crash_is_awaited_and_counts(told_router: RouterProcess) -> None:
    admin = told_router.directory / "admin"
    fault = {"at": "head", "how": "kill", "times": 99}
    with Fleet(told_router, 4), concurrent.futures.ThreadPoolExecutor(1) as pool:
        starts = {row.instance: port for port, row in registered(admin).items()}
        answer = pool.submit(ask, told_router.port, generation(faults=[fault]), "killer")
        files = told_router.directory
        wait_until(lambda: len(list(files.glob("killer-*"))) == MOST_DEATHS, "the request was tried alone")
        assert not answer.done()
        for instance, port in starts.items():
            report_exit(admin, ReplicaExit(f"http://127.0.0.1:{port}", instance, from_outside=False))
        assert answer.result().status == 500
    assert len(list(files.glob("killer-*"))) == MOST_DEATHS


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", 400),
        (b"nonsense", 400),
        (b'{"url": 5, "instance": "a", "from_outside": true}', 400),
        (b'{"url": "http://127.0.0.1:1", "instance": "a", "from_outside": true, "more": 1}', 400),
        (b'{"url": "http://127.0.0.1:1", "instance": "a", "from_outside": true}', 403),
    ],
)
def test_report_of_an_exit_is_validated_and_needs_the_admin_socket(
    told_router: RouterProcess, body: bytes, status: int
) -> None:
    where: Any = told_router.directory / "admin" if status == 400 else told_router.port
    with RawClient(where) as client:
        head = f"POST /admin/endings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.send(head.encode() + body)
        assert client.answer().status == status


def test_a_new_request_waits_for_replicas_that_fd_dp_starts_again(told_router: RouterProcess) -> None:
    with Fleet(told_router, 1) as fleet, concurrent.futures.ThreadPoolExecutor(1) as pool:
        fleet.keeps_alive = False
        fleet[0].end(signal.SIGKILL)
        wait_until(lambda: not told_router.urls(), "the router knows")
        answer = pool.submit(ask, told_router.port, generation())
        fleet.keeps_alive = True
        answer.result().check()
