"""EngineClient with workers that behave and workers that misbehave."""

import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fastdeploy.common.errors import ReplicaUnavailable
from fastdeploy.common.messages import AddRequest, TokenOutput
from fastdeploy.common.request import FinishReason, SamplingParams
from fastdeploy.config import EngineConfig
from fastdeploy.entrypoints.openai.engine_client import ClientGone, EngineClient, EngineState, TokenStream

from .conftest import TINY, wait_until

SCRIPTED = Path(__file__).with_name("scripted_worker.py")


class Run:
    def __init__(self, script: str) -> None:
        self.failures: queue.Queue[str] = queue.Queue()
        self.client = EngineClient(
            EngineConfig(model=TINY), 0, self.failures.put, [sys.executable, str(SCRIPTED), script]
        )
        self.client.start()

    def wait_ready(self) -> EngineClient:
        wait_until(lambda: self.client.status.state is not EngineState.LOADING, "loaded")
        return self.client

    def failure(self) -> str:
        return self.failures.get(timeout=60)


@contextmanager
def worker(script: str) -> Iterator[Run]:
    run = Run(script)
    process = psutil.Process(run.client.worker_pid)
    try:
        yield run
    finally:
        run.client.close(timeout=1)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def request(name: str) -> AddRequest:
    return AddRequest(name, [1, 2, 3], SamplingParams(max_tokens=2), 0.0)


def outputs_of(generation: TokenStream) -> list[TokenOutput]:
    """Return all outputs of a generation without waits that time out."""
    outputs = []
    for output in generation:
        assert output is not None
        outputs.append(output)
    return outputs


def test_tokens_reach_their_own_request() -> None:
    with worker("behaves") as run:
        engine = run.wait_ready()
        with engine.generate([request("a"), request("b")]) as both, engine.generate([request("c")]) as other:
            assert [output.token_ids for output in outputs_of(other)] == [[1], [2]]
            outputs = outputs_of(both)
        for name in "ab":
            mine = [output for output in outputs if output.request_id == name]
            assert [output.token_ids for output in mine] == [[1], [2]]
            assert mine[-1].finish_reason is FinishReason.LENGTH
        assert engine.stats is not None
        assert engine.stats.num_blocks == 8
        assert run.failures.empty()


@pytest.mark.parametrize("how", ["stop", "cancel", "close"])
def test_abandoned_request_is_aborted_in_the_worker(how: str) -> None:
    """The scripted worker continues only after the right abort; its late token must reach no request."""
    with worker("goes on until told") as run:
        engine = run.wait_ready()
        generation = engine.generate([request("a")])
        tokens = iter(generation)
        assert (first := next(tokens))
        assert first.token_ids == [1]
        if how == "cancel":
            generation.cancel()
            with pytest.raises(ClientGone):
                next(tokens)
        else:
            generation.stop("a") if how == "stop" else generation.close()
            assert list(tokens) == []
        with engine.generate([request("b")]) as again:
            assert (first := next(iter(again)))
            assert first.request_id == "b"


def test_client_leaving_before_the_first_token_wakes_the_waiting_thread() -> None:
    with worker("loads for ever"):
        pass
    with worker("goes on until told") as run:
        generation = run.wait_ready().generate([request("a")])
        timer = threading.Timer(0.05, generation.cancel)
        timer.start()
        with pytest.raises(ClientGone):
            list(generation)


def test_worker_is_silent_only_while_a_message_is_due() -> None:
    with worker("is silent until told") as run:
        engine = run.wait_ready()
        assert (engine.progress.requests, engine.progress.silent) == (0, 0)
        generation = engine.generate([request("a"), request("b")])
        assert (engine.progress.requests, engine.progress.pid) == (2, engine.worker_pid)
        wait_until(lambda: engine.progress.silent > 0.1, "the worker is silent")
        # No client waits any more, but the worker has not answered yet.
        generation.close()
        silent = engine.progress.silent
        assert engine.progress.requests == 0
        wait_until(lambda: engine.progress.silent > silent, "the worker is still silent")


def test_each_step_is_progress_and_after_the_last_no_message_is_due() -> None:
    with worker("works for others until told") as run:
        engine = run.wait_ready()
        with engine.generate([request("a")]) as generation:
            next(iter(generation))
            steps = engine.progress.steps
            wait_until(lambda: engine.progress.steps > steps + 3, "steps")
        wait_until(lambda: engine.progress.silent == 0, "a last word")


def test_a_worker_that_dies_ends_every_open_request() -> None:
    with worker("dies with a request") as run:
        generation = run.wait_ready().generate([request("a")])
        with pytest.raises(ReplicaUnavailable, match="stopped working"):
            list(generation)
        assert run.failure().endswith("was killed by SIGKILL")
        assert run.client.status.state is EngineState.FAILED
        with pytest.raises(ReplicaUnavailable):
            run.client.generate([request("b")])


def test_worker_that_dies_at_once_is_reported_with_its_exit_code() -> None:
    with worker("dies at once") as run:
        assert run.failure().endswith("exited with code 7")


def test_last_output_of_a_worker_that_cannot_load_is_the_reason() -> None:
    with worker("cannot load") as run:
        assert run.failure() == "config.json: no such file"
        assert run.client.status.message == "config.json: no such file"


def test_unreadable_message_ends_the_worker_to_avoid_a_gap_in_a_text() -> None:
    with worker("sends nonsense") as run:
        generation = run.wait_ready().generate([request("a")])
        with pytest.raises(ReplicaUnavailable):
            list(generation)
        assert "unreadable message" in run.failure()


def test_a_worker_of_another_version_is_refused() -> None:
    with worker("is of another version") as run:
        assert "protocol 999" in run.failure()


def test_messages_without_the_secret_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with worker("is a stranger") as run:
        wait_until(lambda: "wrong token" in caplog.text, "the wrong token is logged")
        assert run.client.status.state is EngineState.LOADING
        with pytest.raises(ReplicaUnavailable, match="model is loading"):
            run.client.generate([request("a")])


def test_loading_is_reported() -> None:
    with worker("loads for ever") as run:
        status = wait_until(lambda: run.client.status if run.client.status.progress else None, "progress")
        assert (status.state, status.progress, status.stage) == (EngineState.LOADING, 0.5, "reading weights")


@pytest.mark.parametrize("script", ["ignores the end", "never says hello"])
def test_a_worker_that_does_not_stop_is_killed(script: str) -> None:
    run = Run(script)
    process = psutil.Process(run.client.worker_pid)
    if script == "ignores the end":
        run.wait_ready()
    run.client.close(timeout=0.2)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert run.failures.empty(), "a stop that was asked for is no failure"


def test_closing_ends_open_requests() -> None:
    with worker("goes on until told") as run:
        generation = run.wait_ready().generate([request("a")])
        next(iter(generation))
        run.client.close(timeout=0.5)
        with pytest.raises(ReplicaUnavailable, match="shutting down"):
            list(generation)
