"""fd-router as a program: flags, exit codes, shutdown."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from .conftest import FD_ROUTER, RouterProcess
from .fake_engine import FakeEngine, streams_for_ever, wait_until, waits_for


def run(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FD_ROUTER), *flags],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "http"], "--port: invalid int value: 'http'"),
        (["--port", "70000"], "--port is 70000; it must be 1..65535"),
        (["--policy", "fastest"], "it must be one of request_num, round_robin, random, power_of_two"),
        (["--splitwise"], "--splitwise: disaggregated prefill and decode is not supported"),
        (["--config_path", "x.yaml"], "--config_path: FastDeploy's YAML is not supported"),
        (["--workers", "0"], "--workers is 0; it must be 1..16"),
        (["--max-in-flight", "0"], "--max-in-flight is 0; it must be at least 1"),
        (["--max-connections", "100000000"], "file descriptors but the limit is"),
        (["--queue-size", "-1"], "--queue-size is -1; it must be at least 0"),
        (["--certfile", "/etc/hostname"], "--certfile and --keyfile: TLS needs both"),
        (["--admin-keys-file", "/nonexistent"], "--admin-keys-file /nonexistent: cannot be read"),
        (["--host", "example.org"], "--host is 'example.org'; it must be an IP address"),
        (
            ["--allow-host", "10.0.0.0/99"],
            "--allow-host is '10.0.0.0/99'; it must be an address or a network",
        ),
        (["--api-keys-file", "/nonexistent"], "--api-keys-file /nonexistent: cannot be read"),
        (["--registry-file", "/proc/nowhere/registry"], "--registry-file /proc/nowhere/registry"),
        (["--request-timeout-secs", "0"], "--request-timeout-secs is 0; it must be more than 0"),
        (["--log-level", "loud"], "--log-level is 'loud'; it must be one of debug"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(flags: list[str], words: str) -> None:
    ended = run(*flags)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.startswith("fd-router: ")
    assert ended.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_one_line_and_exit_code_5() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = run("--port", str(port))
    assert ended.returncode == 5
    assert ended.stderr == f"fd-router: cannot listen on 127.0.0.1 port {port}: address already in use\n"


@pytest.mark.parametrize("missing", [("uvloop",), ("uvloop", "httptools")])
def test_missing_package_is_named_with_its_remedy(
    tmp_path: Path, missing: tuple[str, str] | tuple[str]
) -> None:
    hide = "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{hide}")
    ended = run("--port", "1", PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr == (
        f"fd-router: the router needs {' and '.join(missing)}, which is not installed: "
        f"{sys.executable} -m pip install {' '.join(missing)}\n"
    )


def test_router_starts_quickly(start_router: Callable[..., RouterProcess]) -> None:
    began = time.monotonic()
    start_router()
    print(f"fd-router was ready after {time.monotonic() - began:.2f} s")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_printed(flag: str) -> None:
    ended = run(flag)
    assert (ended.returncode, ended.stdout.split()[0]) == (0, "fd-router")


def test_router_loads_neither_paddle_nor_numpy() -> None:
    program = (
        "import fastdeploy.daemon.router.server.main, sys; print({'paddle', 'numpy'} & set(sys.modules))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "set()"


def test_router_listens_on_loopback_by_default(
    router: RouterProcess, start_router: Callable[..., RouterProcess]
) -> None:
    def addresses(process: psutil.Process) -> set[str]:
        return {each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}

    assert addresses(psutil.Process(router.process.pid)) == {"127.0.0.1"}
    assert addresses(psutil.Process(start_router("--host", "0.0.0.0").process.pid)) == {"0.0.0.0"}


def test_sigterm_lets_running_requests_end(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    gate = threading.Event()
    engine = new_engine(behaviour=waits_for(gate))
    router.add(engine)
    answers = []
    client = threading.Thread(target=lambda: answers.append(router.complete()))
    client.start()
    wait_until(lambda: engine.received, "the request is under way")
    router.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not listens(router.port), "the router does not listen")
    gate.set()
    client.join(30)
    assert answers[0].status_code == 200
    assert router.process.wait(30) == 0


def test_sigterm_waits_at_most_the_graceful_timeout(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--graceful-timeout-secs", "1")

    router.add(new_engine(behaviour=streams_for_ever))
    with router.complete(body={"stream": True}, stream=True):
        assert router.stop(signal.SIGTERM) == 0


def test_sigint_ends_it_at_once_even_in_the_middle_of_a_stream(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    gate = threading.Event()
    engine = new_engine(behaviour=waits_for(gate))
    router.add(engine)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(router.complete)
        wait_until(lambda: engine.received, "the request is under way")
        assert router.stop(signal.SIGINT) == 0
        gate.set()
        with pytest.raises(requests.ConnectionError):
            answer.result()


def test_a_killed_arbiter_takes_its_worker_along_so_that_the_port_is_free(router: RouterProcess) -> None:
    [worker] = psutil.Process(router.process.pid).children()
    router.process.kill()
    router.process.wait(20)
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running()
    assert not listens(router.port)


def test_a_killed_worker_is_replaced_and_knows_the_registered_replicas(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    router = start_router("--registry-file", str(tmp_path / "registry.json"))
    engine = new_engine(replica=2)
    router.add(engine)
    [worker] = psutil.Process(router.process.pid).children()
    worker.kill()
    worker.wait(20)
    wait_until(lambda: router.urls() == {engine.url}, "the new worker has the replica")
    assert router.complete().headers["X-FD-Replica"] == "2"


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
