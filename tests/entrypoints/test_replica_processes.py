"""Arbiter, HTTP process and worker run or end together, whichever is killed and however they are stopped."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..fake_router import FakeRouter
from ..file_limits import low_file_limit
from ..ports import free_ports
from .conftest import TINY, ApiServer, wait_until


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path, "--timeout-graceful-shutdown", "20") as running:
        yield running.wait_ready()


def open_stream(server: ApiServer, max_tokens: int = 400) -> HTTPResponse:
    """Return a stream whose first event has been read."""
    body = {"prompt": "a", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    stream = urllib.request.urlopen(
        urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        ),
        timeout=60,
    )
    assert stream.readline().startswith(b"data: {")
    return stream


def rest_of(stream: HTTPResponse) -> list[dict[str, Any]]:
    """Return the remaining events, without the final [DONE], which is required."""
    *events, done = [line.removeprefix(b"data: ") for line in stream.read().splitlines() if line]
    assert done == b"[DONE]"
    return [json.loads(event) for event in events]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_killing_the_worker_ends_replica_and_responses(replica: ApiServer) -> None:
    http, worker = replica.children()
    stream = open_stream(replica)
    worker.kill()
    assert rest_of(stream)[-1]["error"]["type"] == "server_error"
    assert replica.process.wait(60) == 3
    assert gone(http)
    assert f"worker pid={worker.pid} was killed by SIGKILL" in replica.log()


def test_a_stream_whose_worker_is_killed_before_its_first_token_is_a_503(replica: ApiServer) -> None:
    """It is not a stream with one error: the status tells a router to try another replica."""
    _, worker = replica.children()
    worker.suspend()
    chat = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(replica.post, "/v1/chat/completions", chat),
            pool.submit(replica.post, "/v1/completions", {"prompt": "a", "stream": True}),
        ]
        wait_until(lambda: replica.metric("requests_number_total") == 2, "both wait for the worker")
        worker.kill()
        for answer in answers:
            status, body = answer.result()
            assert (status, body["error"]["type"]) == (503, "server_error")
    assert replica.process.wait(60) == 3


def test_killing_the_http_process_ends_the_replica(replica: ApiServer) -> None:
    http, worker = replica.children()
    http.kill()
    assert replica.process.wait(60) == 3
    wait_until(lambda: gone(worker), "the worker is gone")
    assert "killed by SIGKILL" in replica.log()


def test_http_process_serves_again_after_a_shortage_of_descriptors(replica: ApiServer) -> None:
    http, _ = replica.children()
    soft, hard = http.rlimit(psutil.RLIMIT_NOFILE)
    # With so few descriptors, it cannot accept the next connection.
    http.rlimit(psutil.RLIMIT_NOFILE, (8, hard))
    assert replica.health(timeout=2) == (0, {})
    wait_until(lambda: "Too many open files" in replica.log(), "the shortage is logged")
    http.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: replica.health()[0] == 200, "the replica serves again")


def test_a_replica_raises_its_own_limit_of_open_files(tmp_path: Path) -> None:
    with low_file_limit():
        running = ApiServer(tmp_path)
    with running as replica:
        http, *_ = wait_until(replica.children, "the HTTP process")
        # Each of 512 requests may need a client, a watch on it, and idle connections.
        assert http.rlimit(psutil.RLIMIT_NOFILE)[0] > 4 * 512


def test_sigusr2_logs_thread_stacks_without_disturbing_requests(replica: ApiServer) -> None:
    http, worker = replica.children()
    stream = open_stream(replica, max_tokens=400)

    def stacks() -> str:
        # A stack is written in pieces, between which the log line of the ended stream may appear.
        return re.sub(r"\d{4}-\d\d-\d\d .*\n", "", replica.log())

    asked = 0
    # Repeat it: a dump of stacks that change would crash the process sooner or later.
    for count in range(1, 6):
        for process, place in (
            (http, r"engine_client\.py\", line \d+ in _run$"),
            (worker, r"worker\.py\", line \d+ in serve$"),
        ):
            process.send_signal(signal.SIGUSR2)
            asked += 1
            # Wait for the last line, before the other process writes to the same file.
            wait_until(
                lambda asked=asked: stacks().count("in _run_module_as_main\n") == asked,
                "the message has arrived",
            )
            assert len(re.findall(place, stacks(), re.MULTILINE)) == count
    assert rest_of(stream)[-1]["choices"][0]["finish_reason"] == "length"
    assert replica.health()[0] == 200


def test_killing_the_arbiter_ends_the_replica(replica: ApiServer) -> None:
    children = replica.children()
    replica.process.kill()
    assert replica.process.wait(60) == -signal.SIGKILL
    wait_until(lambda: all(map(gone, children)), "its children are gone")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_open_requests_finish_and_takes_no_new_ones(
    replica: ApiServer, stop: signal.Signals
) -> None:
    """The signal goes to the whole process group, as from a terminal or a supervisor."""
    children = replica.children()
    stream = open_stream(replica, max_tokens=300)
    os.killpg(replica.process.pid, stop)
    wait_until(lambda: replica.health()[0] != 200, "no new ones")
    assert rest_of(stream)[-1]["choices"][0]["finish_reason"] == "length"
    assert replica.process.wait(60) == 0
    assert all(map(gone, children))


def test_requests_beyond_the_graceful_timeout_get_an_error(tmp_path: Path) -> None:
    with ApiServer(tmp_path, "--timeout-graceful-shutdown", "0") as replica:
        replica.wait_ready()
        stream = open_stream(replica, max_tokens=500)
        assert replica.stop() == 0
        assert "shutting down" in rest_of(stream)[-1]["error"]["message"]


def test_a_stop_while_loading(tmp_path: Path) -> None:
    with ApiServer(tmp_path) as replica:
        wait_until(lambda: replica.health()[0] == 503, "loading")
        status, body = replica.health()
        if status == 503:
            assert body["status"] == "loading"
            assert 0 <= body["progress"] <= 1
        assert replica.stop() == 0


def test_a_broken_checkpoint_is_one_line_and_a_failed_replica(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "model.safetensors").write_bytes(b"not weights")
    with ApiServer(tmp_path, "--model", str(model)) as replica:
        assert replica.process.wait(60) == 3
        assert "model.safetensors" in replica.log()
        assert "Traceback" not in replica.log()


def test_overload_keys_and_compatible_health(tmp_path: Path) -> None:
    """One server has all of these limits, which saves two starts."""
    with ApiServer(
        tmp_path, "--max-concurrency", "1", "--api-key", "one,two", env={"FD_COMPAT_HEALTH": "1"}
    ) as replica:
        assert wait_until(lambda: replica.health()[0], "the replica listens") in (404, 200)
        replica.wait_ready()
        body = {"prompt": "a", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
            assert replica.post("/v1/completions", body, headers)[0] == 401
        key = {"Authorization": "Bearer two"}
        assert replica.post("/v1/completions", body, key)[0] == 200
        long = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True}).encode()
        with socket.create_connection(("127.0.0.1", replica.port)) as first:
            first.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer one\r\nContent-Length: %d\r\n\r\n%s" % (len(long), long)
            )
            wait_until(lambda: replica.metric("num_requests_running") == 1, "the first runs")
            status, answer = replica.post("/v1/completions", body, key)
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert replica.health()[0] == 200


def start_and_fail(*flags: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("flag", ["--port", "--metrics-port", "--engine-worker-queue-port"])
def test_a_taken_port_is_one_line_with_flag_port_and_holder(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        code, text = start_and_fail("--model", str(TINY), "--port", str(free_ports(1)[0]), flag, str(port))
    assert code == 2
    assert f"{flag}: port {port} on 127.0.0.1 is taken by pid {os.getpid()}" in text.splitlines()[-1]
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "/nowhere"), "/nowhere"),
        (("--model", str(TINY), "--quantization", "int4"), "--quantization"),
        (("--model", str(TINY), "--tensor-parallel-size", "2"), "--tensor-parallel-size"),
        (("--model", str(TINY), "--splitwise-role", "prefill"), "--splitwise-role"),
        (("--model", str(TINY), "--router", "nonsense"), "--router"),
        (("--model", str(TINY), "--surprise", "1"), "--surprise"),
        (("--model", str(TINY), "--max-concurrency", "100000000"), "--max-concurrency 100000000 needs"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_at_once(
    flags: tuple[str, str, str, str] | tuple[str, str], words: str
) -> None:
    code, text = start_and_fail(*flags)
    assert code == 2
    assert words in text.splitlines()[-1]
    assert "Traceback" not in text


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    router = FakeRouter()
    yield router
    router.close()


def registered(tmp_path: Path, router: FakeRouter) -> ApiServer:
    replica = ApiServer(tmp_path, "--router", router.address)
    wait_until(lambda: "/register" in router.paths(), "registered")
    return replica


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stop_deregisters_before_it_refuses_requests(
    tmp_path: Path, router: FakeRouter, stop: signal.Signals
) -> None:
    served = []
    with registered(tmp_path, router) as replica:

        def ask_while_it_is_told(path: str) -> None:
            if path == "/deregister":
                served.append(replica.health()[0])
                served.append(replica.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0])

        router.before_answer = ask_while_it_is_told
        stream = open_stream(replica, max_tokens=300)
        replica.process.send_signal(stop)
        assert rest_of(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert replica.process.wait(60) == 0
    assert served == [200, 200]
    first, *_ = router.bodies("/register")
    assert re.fullmatch(r"cpu-\d+-(amx|avx512|avx2|generic)/\w+", first["numeric_version"])
    farewell = {key: first[key] for key in ("host_ip", "port", "instance")}
    assert router.posts[-1] == ("/deregister", farewell)
    assert router.paths().count("/deregister") == 1


def test_worker_death_is_reported_to_the_router(tmp_path: Path, router: FakeRouter) -> None:
    with registered(tmp_path, router) as replica:
        _, worker = replica.children()
        worker.kill()
        assert replica.process.wait(60) == 3
    assert router.paths()[-1] == "/deregister"


def test_hung_router_does_not_delay_a_stop(tmp_path: Path, router: FakeRouter) -> None:
    go_on = threading.Event()
    with registered(tmp_path, router) as replica:
        router.before_answer = lambda path: go_on.wait(60)
        # A second signal during the deregistration has no effect.
        replica.process.terminate()
        wait_until(lambda: "/deregister" in router.paths(), "the router is being told")
        replica.process.terminate()
        assert replica.process.wait(60) == 0
    assert not go_on.is_set()
    go_on.set()


def test_absent_router_does_not_delay_a_stop(tmp_path: Path, router: FakeRouter) -> None:
    with registered(tmp_path, router) as replica:
        router.close()
        assert replica.stop() == 0
        assert "could not deregister from router" in replica.log()
