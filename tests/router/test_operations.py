"""An operator's actions on a running router, and the farewells of replicas."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from .conftest import RouterProcess
from .fake_engine import (
    FakeEngine,
    wait_until,
    waits_after_the_first_event,
    waits_for,
)
from .raw_client import RawAnswer, RawClient

KEYS = "# of the operator\nalpha\n"


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admin") / "socket"


@pytest.fixture(scope="module")
def shared_router(tmp_path_factory: pytest.TempPathFactory, admin: Path) -> Iterator[RouterProcess]:
    keys = tmp_path_factory.mktemp("keys") / "admin"
    keys.write_text(KEYS)
    flags = ["--admin-socket", str(admin), "--admin-keys-file", str(keys)]
    router = RouterProcess(tmp_path_factory.mktemp("router"), *flags)
    yield router
    router.stop()


def tell(where: Path | int, order: str, name: str, key: str = "") -> RawAnswer:
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    with RawClient(where) as client:
        client.send(
            f"POST /admin/replicas/{name}/{order} HTTP/1.1\r\nHost: x\r\n{authorization}\r\n".encode()
        )
        return client.answer()


# ---- orders


def test_the_admin_socket_is_for_its_owner_and_group(shared_router: RouterProcess, admin: Path) -> None:
    mode = admin.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_a_draining_replica_gets_nothing_new_and_its_stream_ends_well(
    lent_router: RouterProcess, admin: Path, new_engine: Callable[..., FakeEngine]
) -> None:
    gate = threading.Event()
    drained = new_engine(replica=0, behaviour=waits_after_the_first_event(gate))
    lent_router.add(drained)
    with lent_router.complete(body={"stream": True}, stream=True) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        answer = tell(admin, "drain", "0")
        assert (answer.status, json.loads(answer.body)["replica"]["draining"]) == (200, True)
        lent_router.add(new_engine(replica=1))
        # A heartbeat does not undo the operator's order.
        lent_router.add(drained)
        for _ in range(6):
            assert lent_router.complete().headers["X-FD-Replica"] == "1"
        assert lent_router.in_flight()[drained.url] == 1
        assert lent_router.metric("fd_router_replica_draining") == [
            f'fd_router_replica_draining{{replica="0",url="{drained.url}"}} 1.0',
            *[line for line in lent_router.metric("fd_router_replica_draining") if 'replica="1"' in line],
        ]
        gate.set()
        assert [line for line in lines if line][-1] == b"data: [DONE]"
    assert tell(admin, "undrain", "0").status == 200
    drained.behaviour = waits_for(gate)
    names = {lent_router.complete().headers["X-FD-Replica"] for _ in range(6)}
    assert names == {"0", "1"}


def test_when_all_replicas_drain_health_reports_503(
    lent_router: RouterProcess, admin: Path, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(replica=3)
    lent_router.add(engine)
    assert tell(admin, "drain", f"127.0.0.1:{engine.port}").status == 200  # addresses work, too
    answer = lent_router.complete()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert lent_router.get("/health_generate").status_code == 503
    assert tell(admin, "undrain", "3").status == 200
    assert lent_router.complete().status_code == 200


def test_removed_replica_is_absent_until_its_next_heartbeat(
    lent_router: RouterProcess, admin: Path, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(replica=4)
    lent_router.add(engine)
    assert tell(admin, "remove", "4").status == 200
    assert lent_router.urls() | lent_router.urls("down") == set()
    lent_router.add(engine)
    assert lent_router.urls() == {engine.url}


@pytest.mark.parametrize("name", ["9", "x", "..", "%2e%2e", "a/b"])
def test_admin_command_for_an_unknown_replica_names_the_known(
    lent_router: RouterProcess, admin: Path, new_engine: Callable[..., FakeEngine], name: str
) -> None:
    lent_router.add(new_engine(replica=5))
    answer = tell(admin, "drain", name)
    assert answer.status == 404
    if "." not in name and "%" not in name:
        assert json.loads(answer.body)["msg"] == f"no replica '{name}'; there are: 5"


def test_unknown_admin_commands_are_404(lent_router: RouterProcess, admin: Path) -> None:
    assert tell(admin, "explode", "0").status == 404
    with RawClient(admin) as client:
        client.send(b"GET /admin/replicas/0/drain HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.answer().status == 405


def test_admin_command_over_loopback_needs_a_key(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    lent_router.add(new_engine(replica=6))
    assert tell(lent_router.port, "drain", "6", key="alpha").status == 200
    refused = [
        tell(lent_router.port, "undrain", name, key) for name in "67" for key in ("", "beta", "alphabet")
    ]
    # A refusal does not reveal whether the replica exists.
    assert {(answer.status, answer.body) for answer in refused} == {(403, refused[0].body)}
    assert b"--admin-keys-file" in refused[0].body
    assert lent_router.get("/registered").json()["mixed"][0]["draining"] is True
    assert tell(lent_router.port, "undrain", "6", key="alpha").status == 200


def test_without_keys_admin_commands_over_loopback_are_refused(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router()
    router.add(new_engine(replica=0))
    for key in ("", "alpha"):
        assert tell(router.port, "drain", "0", key).status == 403


# ---- farewells


def farewell(engine: FakeEngine, router: RouterProcess, instance: str) -> requests.Response:
    body = {"host_ip": "127.0.0.1", "port": engine.port, "instance": instance}
    return requests.post(f"{router.url}/deregister", json=body, timeout=20)


def test_deregistered_replica_completes_its_requests_and_gets_no_new(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    gate = threading.Event()
    leaving, staying = new_engine(replica=0, behaviour=waits_for(gate)), new_engine(replica=1)
    assert leaving.register_with(lent_router.url, instance="aaaa").status_code == 200
    answers = []
    client = threading.Thread(target=lambda: answers.append(lent_router.complete()))
    client.start()
    wait_until(lambda: leaving.received, "a request is under way")
    lent_router.add(staying)
    assert farewell(leaving, lent_router, "bbbb").status_code == 404  # another instance
    assert farewell(leaving, lent_router, "aaaa").json() == {"code": 200, "msg": "Deregister success"}
    assert [lent_router.complete().headers["X-FD-Replica"] for _ in range(6)] == ["1"] * 6
    gate.set()
    client.join(20)
    assert answers[0].headers["X-FD-Replica"] == "0"
    wait_until(lambda: leaving.url not in lent_router.in_flight(), "the replica has left")
    # A late heartbeat does not bring back a replica that has left.
    leaving.register_with(lent_router.url, instance="aaaa")
    assert lent_router.urls() == {staying.url}


def test_a_drained_replica_is_drained_when_it_registers_again(
    lent_router: RouterProcess, admin: Path, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(replica=4)
    assert engine.register_with(lent_router.url, instance="aaaa").status_code == 200
    assert tell(admin, "drain", "4").status == 200
    assert farewell(engine, lent_router, "aaaa").status_code == 200
    assert engine.register_with(lent_router.url, instance="bbbb").status_code == 200
    [entry] = lent_router.get("/registered").json()["mixed"]
    assert (entry["instance"], entry["draining"], entry["leaving"]) == ("bbbb", True, False)
    assert lent_router.complete().status_code == 503
    assert tell(admin, "undrain", "4").status == 200
    assert lent_router.complete().status_code == 200


def test_a_deregistered_replica_is_removed_when_it_is_undrained(
    lent_router: RouterProcess, admin: Path, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(replica=5)
    assert engine.register_with(lent_router.url, instance="aaaa").status_code == 200
    assert tell(admin, "drain", "5").status == 200
    assert farewell(engine, lent_router, "aaaa").status_code == 200
    assert engine.url in lent_router.urls() | lent_router.urls("down")
    assert tell(admin, "undrain", "5").status == 200
    wait_until(lambda: engine.url not in lent_router.urls() | lent_router.urls("down"), "its row is free")


def test_restarted_replica_is_used_at_once(
    lent_router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """The new process has the same address, while the router still considers the old one down."""
    gate = threading.Event()
    engine = new_engine(replica=2)
    assert engine.register_with(lent_router.url, instance="old").status_code == 200
    engine.stop()
    with ThreadPoolExecutor(1) as pool:
        # The request waits for the restarted replica.
        waiting = pool.submit(lent_router.complete)
        wait_until(lambda: lent_router.urls("down") == {engine.url}, "the replica is down")
        engine.restart()
        engine.behaviour = waits_for(gate)
        assert engine.register_with(lent_router.url, instance="new").status_code == 200
        gate.set()
        assert waiting.result().status_code == 200
    [entry] = lent_router.get("/registered").json()["mixed"]
    assert (entry["instance"], entry["in_flight"]) == ("new", 0)
