"""The heartbeat: its content, its timing, and its few log lines. Against a real HTTP server."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.entrypoints import registration
from fastdeploy.entrypoints.registration import (
    Address,
    Identity,
    Registration,
    advertised_ip,
    register_info,
    router_url,
)

from ..fake_router import FakeRouter
from ..waiting import wait_until as _wait_until

ADDRESS = Address(("127.0.0.1",), 1844, 3401, 25641, replica=3)
IDENTITY = Identity(max_concurrency=64)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    router = FakeRouter()
    yield router
    router.close()


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(registration, "_RETRY_SECONDS", 0.02)


@pytest.fixture
def start() -> Iterator[Callable[..., Registration]]:
    started: list[Registration] = []

    def start(router: str, is_healthy: Callable[[], bool] = lambda: True) -> Registration:
        started.append(Registration(router, ADDRESS, IDENTITY, is_healthy, lambda: "cpu-1"))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()
        one.join(10)
        assert not one.is_alive()


wait_until = partial(_wait_until, deadline=20.0)


def test_healthy_replica_registers_repeatedly_and_logs_it_once(
    router: FakeRouter, start: Callable[..., Registration], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastdeploy.entrypoints.registration")
    start(router.address)
    wait_until(lambda: len(router.posts) >= 3)
    path, info = router.posts[-1]
    assert path == "/register"
    assert info == register_info(ADDRESS, IDENTITY, "127.0.0.1", "cpu-1")
    assert [r.message for r in caplog.records] == [f"registered with router http://{router.address}"]


@pytest.mark.parametrize(("keys", "sent"), [("", None), ("first, second", "Bearer first")])
def test_the_first_registration_key_is_sent_below_the_routers_path(
    monkeypatch: pytest.MonkeyPatch,
    router: FakeRouter,
    start: Callable[..., Registration],
    keys: str,
    sent: str | None,
) -> None:
    monkeypatch.setenv("FD_ROUTER_REGISTER_KEY", keys)
    registration = start(f"http://{router.address}/a b")
    wait_until(lambda: router.posts)
    registration.leave()
    assert {*router.paths()} == {"/a%20b/register", "/a%20b/deregister"}
    assert {*router.keys} == {sent}


def test_unhealthy_replica_does_not_register(router: FakeRouter, start: Callable[..., Registration]) -> None:
    healthy = threading.Event()
    asked = threading.Event()

    def is_healthy() -> bool:
        asked.set()
        return healthy.is_set()

    start(router.address, is_healthy)
    assert asked.wait(20)
    assert router.posts == []
    healthy.set()
    wait_until(lambda: len(router.posts) > 0)


def test_problems_are_logged_when_they_begin_and_end(
    router: FakeRouter, start: Callable[..., Registration], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastdeploy.entrypoints.registration")
    router.status = 503
    start(router.address)
    wait_until(lambda: len(router.posts) >= 3)
    router.status = 200
    wait_until(lambda: "registered with" in caplog.text)
    router.close()
    wait_until(lambda: "connection refused" in caplog.text)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    assert "HTTP 503" in messages[0]
    assert "not healthy" in messages[0]
    assert all("\n" not in message for message in messages)


def test_info_is_what_fastdeploys_router_accepts() -> None:
    identity = Identity(512, instance="1f", token="2e")
    assert register_info(ADDRESS, identity, "10.0.0.7", "cpu-1-amx/bfloat16") == {
        "role": "mixed",
        "host_ip": "10.0.0.7",
        "port": "1844",
        "metrics_port": "3401",
        "engine_worker_queue_port": "25641",
        "tp_size": 1,
        "replica": 3,
        "instance": "1f",
        "features": ["resume", "progress"],
        "max_concurrency": 512,
        "token": "2e",
        "numeric_version": "cpu-1-amx/bfloat16",
    }


def test_each_start_has_its_own_identity_and_secret_token() -> None:
    one, other = Identity(1), Identity(1)
    for value in (one.instance, one.token):
        assert len(value) == 32
        assert int(value, 16) >= 0
    assert len({one.instance, one.token, other.instance, other.token}) == 4
    assert one.token not in repr(one)


def test_deregistration_is_the_last_message(router: FakeRouter, start: Callable[..., Registration]) -> None:
    registration = start(router.address)
    wait_until(lambda: len(router.posts) >= 2)
    registration.leave()
    assert not registration.is_alive()
    assert router.paths().index("/deregister") == len(router.posts) - 1
    body = {"host_ip": "127.0.0.1", "port": "1844", "instance": IDENTITY.instance}
    assert router.posts[-1] == ("/deregister", body)


def test_deregistration_never_overtakes_a_heartbeat(
    router: FakeRouter, start: Callable[..., Registration]
) -> None:
    """A heartbeat that arrives later would register the replica again."""
    beats, go_on = threading.Event(), threading.Event()

    def hold(path: str) -> None:
        if path == "/register":
            beats.set()
            go_on.wait(20)

    router.before_answer = hold
    registration = start(router.address)
    assert beats.wait(20)
    # leave() waits for the router for a limited time only.
    registration.leave(timeout=0.05)
    assert router.paths() == ["/register"]
    go_on.set()
    wait_until(lambda: router.paths() == ["/register", "/deregister"])


def test_unregistered_replica_does_not_deregister(
    router: FakeRouter, start: Callable[..., Registration]
) -> None:
    start(router.address, lambda: False).leave()
    assert router.posts == []


@pytest.mark.parametrize("status", [404, 500])
def test_rejected_deregistration_does_not_prevent_leaving(
    router: FakeRouter, start: Callable[..., Registration], status: int
) -> None:
    registration = start(router.address)
    wait_until(lambda: router.posts)
    router.status = status
    registration.leave()
    assert router.paths()[-1] == "/deregister"


def test_unreachable_router_does_not_prevent_leaving(start: Callable[..., Registration]) -> None:
    router = FakeRouter()
    registration = start(router.address)
    wait_until(lambda: router.posts)
    router.close()
    registration.leave(timeout=20)
    assert not registration.is_alive()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("0.0.0.0:30000", "http://127.0.0.1:30000"),
        ("router.local:30000", "http://router.local:30000"),
        ("http://10.1.2.3:30000/", "http://10.1.2.3:30000"),
        ("https://router.example", "https://router.example"),
        ("http://router:80/prefix/", "http://router:80/prefix"),
        ("[::]:30000", "http://[::1]:30000"),
        ("[fe80::2]:30000", "http://[fe80::2]:30000"),
    ],
)
def test_addresses_of_a_router(text: str, url: str) -> None:
    assert router_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "router", ":30000", "router:port", "router:99999", "router:0", "ftp://router:1", "http://u:p@r:1"],
)
def test_invalid_router_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--router is .*HOST:PORT"):
        router_url(text)


@pytest.mark.parametrize(
    ("listening", "router", "advertised"),
    [
        (["127.0.0.1"], "http://10.0.0.1:30000", "127.0.0.1"),
        (["127.0.0.1"], "http://127.0.0.1:30000", "127.0.0.1"),
        (["127.0.0.1", "::1"], "http://127.0.0.1:30000", "127.0.0.1"),
        (["127.0.0.1", "::1"], "http://[::1]:30000", "::1"),
        (["127.0.0.1"], "http://[::1]:30000", "127.0.0.1"),
        (["::1"], "http://127.0.0.1:30000", "::1"),
        (["127.0.0.2"], "http://127.0.0.1:30000", "127.0.0.2"),
        (["0.0.0.0"], "http://127.0.0.1:30000", "127.0.0.1"),
        (["0.0.0.0"], "http://[::1]:30000", "127.0.0.1"),
        (["::"], "http://127.0.0.1:30000", "127.0.0.1"),
        (["::"], "http://[::1]:30000", "::1"),
    ],
)
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_an_address_that_is_bound_is_advertised(listening: list[str], router: str, advertised: str) -> None:
    assert advertised_ip(listening, router) == advertised


def test_redirect_does_not_count_as_registration(
    router: FakeRouter, start: Callable[..., Registration], caplog: pytest.LogCaptureFixture
) -> None:
    router.status = 307
    start(router.address)
    wait_until(lambda: "HTTP 307" in caplog.text)
    assert set(router.paths()) == {"/register"}


def test_unresolvable_name_is_retried(
    monkeypatch: pytest.MonkeyPatch, start: Callable[..., Registration], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    thread = start("router.invalid:30000")
    wait_until(lambda: "Name or service not known" in caplog.text)
    assert thread.is_alive()
