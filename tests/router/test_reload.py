"""SIGHUP loads new keys into new workers without disturbing clients."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from .. import waiting
from .conftest import RouterProcess
from .fake_engine import FakeEngine, Received, wait_until, waits_after_the_first_event
from .steady_load import Load, requests_counted, streams_or_answers


def test_a_reload_loses_nothing(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    """New workers take over, and the old ones finish their requests."""
    router = start_router("--workers", "2")
    engines = [new_engine(replica=number, behaviour=streams_or_answers) for number in range(2)]
    router.add(*engines)
    before = {worker.pid for worker in router.workers()}
    with Load(router) as load:
        for _ in range(2):
            load.wait()
            old = {worker.pid for worker in router.workers()}
            router.process.send_signal(signal.SIGHUP)
            load.wait()
            wait_until(
                lambda old=old: not old & {worker.pid for worker in router.workers()},
                "the old workers have ended",
            )
            load.wait()
    assert load.problems == []
    assert not before & {worker.pid for worker in router.workers()}
    assert router.urls() == {engine.url for engine in engines}
    wait_until(lambda: requests_counted(router) == load.answered, "everything has been counted, once")
    router.wait_idle()


def test_reload_reads_new_keys_and_a_broken_file_changes_nothing(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\n")
    router = start_router("--api-keys-file", str(keys))
    gate = threading.Event()

    def streams_till_the_gate_opens(received: Received) -> bool:
        if b"long" not in received.body:
            return streams_or_answers(received)
        return waits_after_the_first_event(gate)(received)

    router.add(new_engine(behaviour=streams_till_the_gate_opens))

    def status(key: str) -> int:
        return router.complete(headers={"Authorization": f"Bearer {key}"}).status_code

    assert [status(key) for key in ("alpha", "beta")] == [200, 401]
    old = {worker.pid for worker in router.workers()}
    # Otherwise the old worker would wait for another request on that connection.
    headers = {"Authorization": "Bearer alpha", "Connection": "close"}
    with router.complete(body={"stream": True, "long": True}, headers=headers, stream=True) as stream:
        lines = (line for line in stream.iter_lines(chunk_size=1) if line)
        assert next(lines)
        keys.write_text("beta\n")
        router.process.send_signal(signal.SIGHUP)
        wait_until(lambda: status("beta") == 200, "the new key is let in")
        wait_until(lambda: status("alpha") == 401, "the old one is not")
        gate.set()
        assert list(lines)[-1] == b"data: [DONE]"
    wait_until(lambda: not old & {worker.pid for worker in router.workers()}, "who let alpha in has ended")
    keys.write_text("# nobody\n")
    router.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "has no key in it" in router.log.read_text(), "the fault is named")
    assert [status(key) for key in ("alpha", "beta")] == [401, 200]
    assert router.process.poll() is None


def test_workers_that_hang_do_not_use_up_the_board(start_router: Callable[..., RouterProcess]) -> None:
    """The board has 32 places, and workers that are ending still hold theirs."""
    router = start_router("--workers", "16", "--worker-timeout-secs", "3")
    for generation in (1, 2):
        wait_until(
            lambda generation=generation: router.log.read_text().count("listening on") >= 16 * generation,
            "all workers are there",
        )
        assert router.get("/health").status_code == 200
        for worker in router.workers():
            # The router kills those that it has found to hang.
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.suspend()
        router.process.send_signal(signal.SIGHUP)
    waiting.wait_until(
        lambda: router.get("/health").json()["reload"] == {"number": 2, "outcome": "done"},
        "those that hang have made room",
        deadline=60.0,
    )
    assert router.get("/health").status_code == 200
    assert len(router.workers()) <= 32
