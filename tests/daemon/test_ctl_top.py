"""`fdctl top`: figures of programs that answer, and of programs that do not."""

from __future__ import annotations

import contextlib
import http.server
import inspect
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastdeploy.common.messages import ExpertParallelStats, Ready, Stats
from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.control.protocol import DaemonUnreachable
from fastdeploy.daemon.fdctl import table, top
from fastdeploy.daemon.fdctl.scrapes import BackgroundCalls, History, Scrape
from fastdeploy.daemon.router.metrics import metrics as router_metrics
from fastdeploy.entrypoints.gpu_usage import GpuUsage
from fastdeploy.entrypoints.metrics import ReplicaMetrics

from ..ports import free_ports
from ..waiting import wait_until
from .scripted_daemon import Terminal, scripted

Serve = Callable[[Callable[[], str]], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a program whose /metrics answers with the result of a function; return its port."""
    servers = []

    def start(text: Callable[[], str]) -> int:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = text().encode()
                self.send_response(200 if self.path == "/metrics" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def entry(number: int | None, port: int, pid: int | None = 7, **other: Any) -> dict[str, Any]:
    named = {"name": "router"} if number is None else {"name": f"replica{number}", "replica": number}
    known = {"state": "READY", "intent": "run", "draining": False, "progress": None, "in_flight": 2}
    known["drain_confirmed"] = None
    where = {"pid": pid, "restarts": 3, "host": "127.0.0.1", "metrics_port": port}
    return named | known | where | other


def status(*entries: dict[str, Any]) -> dict[str, Any]:
    replicas = [each for each in entries if "replica" in each]
    router = next((each for each in entries if "replica" not in each), None)
    daemon = {
        "url": "http://127.0.0.1:1",
        "state": "READY",
        "ready": len(replicas),
        "replicas": len(replicas),
    }
    return {"daemon": daemon, "router": router, "replicas": replicas}


def replica_metrics(*, on_gpu: bool = False) -> ReplicaMetrics:
    """Return a replica's own exposition, as it is after a step."""
    group = ExpertParallelStats(
        epoch=1,
        active_ranks=[0, 1],
        joins_total=2,
        leaves_total=0,
        losses_total=0,
        restarted_steps_total=0,
        steps_total=100,
        step_seconds_total=5.0,
        bytes_dispatched_total=1,
        bytes_combined_total=1,
        waited_seconds_total=[0.0, 1.0],
        expert_tokens_total=[1],
    )
    stats = Stats(3, 4, 100, 75, 0, 0, 0, 100, 8, 8, group)
    usage = GpuUsage(45 * 10**9, 150 * 10**9, 0.37)
    ready = Ready(100, 64, 2048, "GPU-1" if on_gpu else "")
    return ReplicaMetrics(lambda: stats, lambda: ready, 8, lambda uuid: usage)


# ---- figures


def test_frame_shows_rates_between_two_scrapes(serve: Serve) -> None:
    metrics = replica_metrics()
    port = serve(lambda: metrics.render().decode())
    source = top.Source(lambda: status(entry(0, port)))
    (before,) = source.frame()["replicas"]
    assert (before["running"], before["queue"], before["kv_use"]) == (3, 4, 0.25)
    assert (before["tokens_per_second"], before["ttft"]) == (None, None)
    metrics.generation_tokens.inc(1000)
    metrics.prompt_tokens.inc(100)
    for seconds in (0.2, 0.4):
        metrics.first_token.observe(seconds)
    (after,) = source.frame()["replicas"]
    assert after["tokens_per_second"] > 0
    assert after["tokens_per_second"] == pytest.approx(10 * after["prompt_tokens_per_second"])
    assert after["ttft"] == pytest.approx(0.3)
    assert after["itl"] is None
    assert (after["in_flight"], after["restarts"], after["state"]) == (2, 3, "READY")


def test_every_metric_that_top_reads_is_exported() -> None:
    source = inspect.getsource(top)
    told = replica_metrics(on_gpu=True).render().decode()
    for name in re.findall(r"fastdeploy:\w+", source):
        assert re.search(rf"^{name}", told, re.MULTILINE), name
    router = inspect.getsource(router_metrics)
    for name in re.findall(r'"(fd_router_\w+|inference_requests)(?:_total)?"', source):
        assert f'"{name.removesuffix("_total")}"' in router, name


def test_a_replica_on_a_gpu_has_its_figures(serve: Serve) -> None:
    ports = [serve(lambda: replica_metrics(on_gpu=True).render().decode())]
    ports.append(serve(lambda: replica_metrics().render().decode()))
    source = top.Source(lambda: status(*(entry(number, port) for number, port in enumerate(ports))))
    frame = source.frame()
    figures = [
        [replica[key] for key in ("gpu_use", "gpu_memory_used", "gpu_memory_total")]
        for replica in frame["replicas"]
    ]
    assert figures == [[0.37, 45 * 10**9, 150 * 10**9], [None, None, None]]
    shown = drawn(frame)
    assert re.search(r"GPU use +GPU memory +restarts", shown)
    assert re.search(r"^0 .* 37% +45\.0 GB of 150\.0 GB +3$", shown, re.MULTILINE)
    assert re.search(r"^1 .* - +- +3$", shown, re.MULTILINE)
    frame["replicas"].pop(0)
    assert "GPU" not in drawn(frame)


def drawn(frame: dict[str, Any]) -> str:
    console = Console(width=300)
    with console.capture() as captured:
        console.print(table.of_top(frame))
    return re.sub(r" +$", "", captured.get(), flags=re.MULTILINE)


def test_the_router_and_the_box_have_a_line_each(serve: Serve) -> None:
    counts = {"inference_requests_total": 10.0, "fd_router_retries_total": 1.0}

    def text() -> str:
        lines = [f'{name}{{replica="{each}"}} {count}' for name, count in counts.items() for each in "ab"]
        return "\n".join(
            [*lines, 'fd_router_in_flight{replica="a"} 3', 'fd_router_in_flight{replica="b"} 4', ""]
        )

    source = top.Source(lambda: status(entry(None, serve(text))))
    assert source.frame()["router"]["requests_per_second"] is None
    counts["inference_requests_total"] += 5
    frame = source.frame()
    router, box = frame["router"], frame["box"]
    assert router["requests_per_second"] > 0
    # Without a series of resumes (a router without replicas has none) the count is 0, not unknown.
    assert (router["retries"], router["resumes"], router["in_flight"]) == (2, 0, 7)
    # CPU time is unknown within one tick of the kernel's clock.
    cpu = box["cpu"] or wait_until(lambda: source.frame()["box"]["cpu"], "a tick", deadline=30)
    assert 0 < cpu <= 1
    assert 0 < box["memory_used"] < box["memory_total"]


def test_unresponsive_replica_lacks_figures_without_delaying_fdctl_top(serve: Serve) -> None:
    over = threading.Event()
    ports = [
        serve(lambda: replica_metrics().render().decode()),
        serve(lambda: str(over.wait(60))),
        free_ports(1)[0],
        serve(lambda: "{ this is no exposition"),
    ]
    rows = [entry(number, port) for number, port in enumerate(ports)]
    source = top.Source(lambda: status(*rows, entry(4, 1, pid=None, state="STOPPED")))
    began = time.monotonic()
    for _ in range(3):
        replicas = source.frame()["replicas"]
    over.set()
    # One of these ports answers only after a minute.
    assert time.monotonic() - began < 30
    assert [each["kv_use"] for each in replicas] == [0.25, None, None, None, None]
    assert [each["in_flight"] for each in replicas] == [2, 2, 2, 2, 2]


def test_silent_daemon_is_reported_and_figures_continue(serve: Serve) -> None:
    port = serve(lambda: replica_metrics().render().decode())
    answers = iter([status(entry(0, port))])

    def ask() -> dict[str, Any]:
        try:
            return next(answers)
        except StopIteration:
            raise DaemonUnreachable("fd-dp cannot be asked") from None

    source = top.Source(ask)
    source.frame()
    frame = source.frame()
    assert frame["problem"] == "fd-dp cannot be asked"
    assert frame["replicas"][0]["kv_use"] == 0.25


def test_rates_start_again_after_a_replica_restart(serve: Serve) -> None:
    metrics = replica_metrics()
    metrics.generation_tokens.inc(10**6)
    port = serve(lambda: metrics.render().decode())
    row = entry(0, port)
    source = top.Source(lambda: status(dict(row)))
    source.frame()
    row["pid"] = 8
    # This frame reads the new pid; the next one has the first figures of the new process.
    source.frame()
    (again,) = source.frame()["replicas"]
    assert again["tokens_per_second"] is None


@given(st.lists(st.integers(0, 100), min_size=2, max_size=30))
def test_a_rate_is_never_negative_and_never_more_than_was_counted(counts: list[int]) -> None:
    history = History()
    for second, count in enumerate(counts):
        history.add(Scrape.parse(f"c_total {count}\n", float(second)))
        assert len(history.scrapes) <= 12
    rate = history.rate("c_total")
    assert rate is not None
    assert 0 <= rate <= max(counts)
    if counts == sorted(counts) and len(counts) <= 10:
        assert rate == pytest.approx((counts[-1] - counts[0]) / (len(counts) - 1))


def test_a_call_that_does_not_return_is_not_repeated() -> None:
    over, started = threading.Event(), []
    calls = BackgroundCalls()

    def slow() -> str:
        started.append("slow")
        over.wait(60)
        return "late"

    for _ in range(3):
        calls.start({"slow": slow, "quick": lambda: "at once", "broken": lambda: 1 / 0})
        results: dict[Any, Any] = {}
        wait_until(lambda: results.update(calls.take(0.01)) or len(results) == 2, deadline=30)  # noqa: B023
        assert results["quick"] == "at once"
        assert isinstance(results["broken"], ZeroDivisionError)
    assert started == ["slow"]
    over.set()
    wait_until(lambda: calls.take(0.01) == {"slow": "late"}, deadline=30)


# ---- the screen


@contextlib.contextmanager
def daemon(path: Path, serve: Serve) -> Iterator[None]:
    port = serve(lambda: replica_metrics().render().decode())
    answer = {
        "code": protocol.OK,
        "status": status(entry(None, port), entry(0, port, draining=True, drain_confirmed=True)),
    }
    with scripted(path, lambda _: [answer]):
        yield


@pytest.mark.parametrize(("key", "code"), [(b"q", protocol.OK), (b"\x03", protocol.DETACHED)])
def test_top_runs_until_q_or_ctrl_c(key: bytes, code: int, tmp_path: Path, serve: Serve) -> None:
    with daemon(tmp_path / "s", serve):
        terminal = Terminal("--socket", str(tmp_path / "s"), "top")
        text = terminal.shows(r"25%(?s:.*)25%")
        assert re.search(r"0 +READY draining +2 +3 +4 +", text)
        terminal.type(key)
        assert terminal.end()[0] == code


def test_top_exits_when_its_terminal_closes(tmp_path: Path, serve: Serve) -> None:
    """It exits even under nohup, where no SIGHUP ends it: its output can no longer be seen."""
    with daemon(tmp_path / "s", serve):
        terminal = Terminal("--socket", str(tmp_path / "s"), "top", nohup=True)
        terminal.shows("READY")
        terminal.hang_up()
        try:
            assert terminal.process.wait(timeout=40) in (protocol.OK, protocol.FAILED)
        finally:
            terminal.process.kill()


def test_top_without_a_daemon_exits_at_once(tmp_path: Path) -> None:
    terminal = Terminal("--socket", str(tmp_path / "s"), "top")
    code, text = terminal.end()
    assert code == protocol.NO_DAEMON
    assert text.startswith("fdctl: ERROR (no fd-dp listens on")
