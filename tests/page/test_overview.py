"""Figures of the page: what /overview contains, who may read it, and how often replicas are asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.router.board.board import Board
from fastdeploy.daemon.router.instance import Instance
from fastdeploy.daemon.router.page.overview import Overview
from fastdeploy.daemon.router.page.samples import Sample

from ..entrypoints.conftest import ApiServer
from ..router.boards import Clock, pick, seat_replicas
from ..router.conftest import RouterProcess, board, clock
from ..router.fake_engine import FakeEngine, wait_until
from .engines import exposition

__all__ = ["board", "clock"]


class Replicas:
    """Replicas of a board, whose metrics a test sets, by number."""

    def __init__(self, board: Board, clock: Clock, count: int) -> None:
        seat_replicas(board, count)
        self.texts = {number: exposition() for number in range(count)}
        #: Numbers of replicas in the order in which they were asked.
        self.asked: list[int | None] = []
        self._clock = clock
        self._overview = Overview(board, "request_num", self._sample, clock)

    def _sample(self, instance: Instance) -> Sample | None:
        self.asked.append(instance.replica)
        text = self.texts.get(instance.replica or 0)
        return None if text is None else Sample.parse(text.encode(), self._clock.now)

    def read(self, after: float = 0.0) -> dict[str, Any]:
        self._clock.now += after
        content: dict[str, Any] = json.loads(self._overview.json())
        return content


def test_figures_are_those_of_board_and_metrics(board: Board, clock: Clock) -> None:
    replicas = Replicas(board, clock, 2)
    pick(board)
    replicas.texts[1] = exposition(running=3, waiting=2, kv_use=0.25, tokens=100)
    replicas.read()
    replicas.texts[1] = exposition(running=3, waiting=2, kv_use=0.25, tokens=180)
    first, second = replicas.read(after=2)["replicas"]
    assert (first["name"], first["state"], first["in_flight"]) == ("0", "up", 1)
    assert second == {
        "name": "1",
        "state": "up",
        "in_flight": 0,
        "running": 3,
        "waiting": 2,
        "kv_use": 0.25,
        "tokens_per_second": 40.0,
    }


def test_no_address_or_secret_is_shown(board: Board, clock: Clock) -> None:
    board.admit(Instance("10.1.2.3", 1811, 0, metrics_port="3101", instance="the-start", token="the-token"))
    text = json.dumps(Replicas(board, clock, 0).read())
    assert not [each for each in ("10.1.2.3", "1811", "3101", "the-start", "the-token") if each in text]


def test_states_of_the_board_are_named(board: Board, clock: Clock) -> None:
    replicas = Replicas(board, clock, 5)
    # A replica that leaves stays on the board until its requests have ended.
    for _ in range(5):
        pick(board)
    down, draining, leaving, *_ = board.handles()
    board.unreachable(down, "test")
    board.drain(draining)
    board.deregister(leaving.url, "")
    reserved = board.reserve()
    assert reserved is not None
    [up] = {"3", "4"} - {reserved.name}
    assert {each["name"]: each["state"] for each in replicas.read()["replicas"]} == {
        "0": "down",
        "1": "draining",
        "2": "leaving",
        reserved.name: "reserved",
        up: "up",
    }
    assert 0 not in replicas.asked, "a replica that is down is not asked"


def test_replicas_are_asked_once_a_second_for_any_number_of_pages(board: Board, clock: Clock) -> None:
    replicas = Replicas(board, clock, 3)
    for _ in range(50):
        replicas.read(after=0.01)
    assert sorted(map(str, replicas.asked)) == ["0", "1", "2"]
    replicas.read(after=1)
    assert len(replicas.asked) == 6


def test_a_replica_that_hangs_delays_no_other(board: Board, clock: Clock) -> None:
    gate = threading.Event()
    seat_replicas(board, 2)

    def hangs(instance: Instance) -> Sample | None:
        if instance.replica == 0:
            gate.wait(30)
        return Sample.parse(exposition(running=5).encode(), clock.now)

    overview = Overview(board, "request_num", hangs, clock)
    for _ in range(3):
        first, second = json.loads(overview.json())["replicas"]
        assert (first["running"], second["running"]) == (None, 5)
        clock.now += 1
    gate.set()


def test_old_figures_are_not_shown(board: Board, clock: Clock) -> None:
    replicas = Replicas(board, clock, 1)
    replicas.read()
    replicas.texts.clear()
    assert replicas.read(after=2)["replicas"][0]["running"] == 0
    assert replicas.read(after=3)["replicas"][0]["running"] is None


def test_the_rank_that_others_wait_for_is_named(board: Board, clock: Clock) -> None:
    replicas = Replicas(board, clock, 4)
    assert replicas.read()["experts"] is None
    clock.now += 60
    for waited in (0.0, 0.5):
        for rank in (0, 1, 2):
            replicas.texts[rank] = exposition(
                epoch=7, steps=int(waited * 100), waited=[0, 0, waited * (rank != 2), 0]
            )
        replicas.texts[3] = exposition(epoch=6, waited=[0, 0, 0, 0])
        group = replicas.read(after=2)["experts"]
    assert (group["epoch"], group["ranks"], group["members"]) == (7, 4, [0, 1, 2])
    assert (group["awaited"], group["awaited_share"]) == (2, 0.25)
    assert group["step_seconds"] == pytest.approx(0.01)


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_metrics_are_read_without_an_error(rest: bytes) -> None:
    text = exposition(running=2).encode()
    assert Sample.parse(text + rest, 0.0).total("num_requests_running") is not None
    Sample.parse(rest + b"\nfastdeploy:ep_epoch 1e999\n", 0.0).count("ep_epoch")


def test_page_needs_no_key_and_figures_do(start_router: Callable[..., RouterProcess]) -> None:
    router = start_router(env={"FD_API_KEY": "secret-key"})
    page = router.get("/")
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert router.get("/overview").status_code == 401
    key = {"Authorization": "Bearer secret-key"}
    assert router.get("/overview", headers=key).json()["replicas"] == []


def test_no_other_site_can_read_them(start_router: Callable[..., RouterProcess]) -> None:
    router = start_router("--cors-origins", "*")
    origin = {"Origin": "https://elsewhere.example"}
    assert "Access-Control-Allow-Origin" in router.get("/version", headers=origin).headers
    for path in ("/", "/overview"):
        headers = router.get(path, headers=origin).headers
        assert not [name for name in headers if name.startswith("Access-Control-")]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        asks = {**origin, "Access-Control-Request-Method": "GET"}
        preflight = requests.options(router.url + path, headers=asks, timeout=10)
        assert "Access-Control-Allow-Origin" not in preflight.headers


def test_no_page_turns_both_off(start_router: Callable[..., RouterProcess]) -> None:
    router = start_router("--no-page")
    assert [router.get(path).status_code for path in ("/", "/overview")] == [404, 404]


def test_figures_of_a_real_replica(lent_router: RouterProcess, tmp_path: Any) -> None:
    with ApiServer(tmp_path, "--router", lent_router.url) as replica:
        replica.wait_ready()
        wait_until(lambda: replica.url in lent_router.urls(), "it is registered")
        lent_router.complete(body={"max_tokens": 4})

        def figures() -> Any:
            [shown] = lent_router.get("/overview").json()["replicas"]
            return shown if shown["tokens_per_second"] is not None else None

        shown = wait_until(figures, "two samples")
        assert (shown["name"], shown["state"], shown["running"], shown["waiting"]) == ("0", "up", 0, 0)
        assert 0.0 <= shown["kv_use"] <= 1.0


def test_a_hung_replica_does_not_delay_the_end(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router()
    engine = new_engine(replica=0)
    router.add(engine)
    engine.behaviour = lambda received: received.wait_until_cancelled() and False
    assert router.get("/overview").json()["replicas"][0]["running"] is None
    assert router.stop() == 0
