"""Traces of requests through the router and real replicas, as a collector receives them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ..collector import Collector, Span, collecting
from ..entrypoints.conftest import ApiServer
from .conftest import RouterProcess
from .fake_engine import FakeEngine, answers, answers_status, closes, wait_until
from .test_live_flags import LiveRouter

TRACE, SPAN = "ab" * 16, "cd" * 8
#: Export at once, so that a process that is killed has exported what has ended.
QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
#: Export only at the end of the process.
LATE = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
#: A package that cannot be imported, and reports that it was tried.
TRAP = "import os\nopen(os.environ['TRAP_LOG'], 'a').write('imported ')\nraise ImportError('trap')\n"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def start_replica(tmp_path: Path) -> Iterator[Callable[..., ApiServer]]:
    with ExitStack() as stack:

        def start(number: int, *flags: str, env: dict[str, str]) -> ApiServer:
            directory = tmp_path / f"replica{number}"
            directory.mkdir()
            flags += ("--data-parallel-size", "8", "--local-data-parallel-id", str(number))
            return stack.enter_context(ApiServer(directory, *flags, env=env))

        yield start


@pytest.fixture
def trap(tmp_path: Path) -> dict[str, str]:
    """Variables of a process without the extra `otel`."""
    package = tmp_path / "trap" / "opentelemetry"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TRAP)
    return {"PYTHONPATH": str(package.parent), "TRAP_LOG": str(tmp_path / "imports")}


def parent(flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{SPAN}-{flags}", "tracestate": "vendor=1"}


def trace_of(collector: Collector, *, when: Callable[[list[Span]], Any]) -> list[Span]:
    wait_until(lambda: when(collector.trace(TRACE)), "the spans are there")
    return collector.trace(TRACE)


def test_resumed_request_is_one_trace_with_both_replicas(
    collector: Collector,
    start_router: Callable[..., RouterProcess],
    start_replica: Callable[..., ApiServer],
) -> None:
    flags = ("--otlp-traces-endpoint", collector.url)
    router = start_router(*flags, env=QUICK)
    replicas = {
        str(number): start_replica(number, "--router", router.url, *flags, env=QUICK) for number in (0, 1)
    }
    urls = {replica.url for replica in replicas.values()}
    wait_until(lambda: urls <= router.urls(), "both are there", deadline=90)
    fields = {"prompt": "my secret", "max_tokens": 450, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", **parent()}
    request = urllib.request.Request(f"{router.url}/v1/completions", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.readline()
        first = answer.headers["X-FD-Replica"]
        # Otherwise it might end the stream before its first spans are exported.
        replicas[first].children()[1].suspend()
        trace_of(collector, when=lambda spans: "prefill" in {span.name for span in spans})
        os.killpg(replicas[first].process.pid, signal.SIGKILL)
        assert answer.read().endswith(b"data: [DONE]\n\n")

    ends = {"POST /v1/completions", "POST /internal/resume"}
    spans = trace_of(collector, when=lambda spans: ends <= {span.name for span in spans})
    by_name = {span.name: span for span in spans if span.service == "fd-router"}
    root, attempt, resume = by_name["POST /v1/completions"], by_name["attempt"], by_name["resume"]
    assert [attempt.attributes["fd.replica"], resume.attributes["fd.replica"]] == [first, str(1 - int(first))]
    assert {attempt.parent_id, resume.parent_id} == {root.span_id}
    assert (attempt.failed, attempt.attributes["error.type"], resume.failed) == (True, "cut", False)
    assert root.start <= attempt.start <= attempt.end <= resume.start <= resume.end <= root.end

    # The span of the killed replica's request never ended, but what had ended before is there.
    (server,) = [span for span in spans if span.parent_id == resume.span_id]
    assert (server.name, server.service) == ("POST /internal/resume", "fd-replica")
    within = [span for span in spans if span.parent_id == server.span_id]
    assert [span.name for span in within] == ["tokenize", "queue", "prefill", "decode"]
    times = [resume.start, server.start, *(time for span in within for time in (span.start, span.end))]
    assert times == sorted(times)
    lost = [span for span in spans if span.service == "fd-replica" and span not in (server, *within)]
    assert [span.name for span in lost] == ["tokenize", "queue", "prefill"]
    assert len({span.parent_id for span in lost}) == 1

    figures = server.attributes
    assert (figures["gen_ai.operation.name"], figures["gen_ai.request.model"]) == ("text_completion", "tiny")
    assert figures["gen_ai.usage.output_tokens"] + figures["fd.resumed_tokens"] == 450
    assert figures["gen_ai.response.finish_reasons"] == ["length"]
    assert not any(b"my secret" in body for body in collector.bodies)
    wait_until(lambda: f" trace={TRACE} replica=" in router.log.read_text(), "the router's line")
    second = replicas[str(1 - int(first))]
    wait_until(lambda: f" trace={TRACE} POST /internal/resume " in second.log(), "the replica's line")


def test_spans_of_the_last_requests_are_exported_at_the_end(
    collector: Collector,
    start_router: Callable[..., RouterProcess],
    start_replica: Callable[..., ApiServer],
) -> None:
    env = {
        **LATE,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=mine",
    }
    router = start_router(env=env)
    replica = start_replica(3, "--router", router.url, env=env)
    wait_until(lambda: replica.url in router.urls(), "it is there", deadline=90)
    # The last one is left to the router, which has a trace of its own for it.
    for header in (parent(), parent("00"), {"traceparent": f"00-{TRACE}-{SPAN}-zz"}):
        assert router.complete(headers=header).status_code == 200
    assert collector.spans == []
    assert replica.stop() == 0
    assert router.stop(signal.SIGTERM) == 0
    assert {span.service for span in collector.spans} == {"mine"}
    sampled, other = [
        [span for span in collector.spans if (span.trace_id == TRACE) is is_it] for is_it in (True, False)
    ]
    assert [span.name for span in other].count("POST /v1/completions") == 2
    assert sorted(span.name for span in sampled) == sorted(span.name for span in other)
    assert len({span.trace_id for span in other}) == 1
    assert [span.parent_id for span in other].count("") == 1


def test_replica_continues_the_trace_of_its_attempt(
    collector: Collector, start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    """A request that the router has not sampled reaches the replica as not sampled, too."""
    router = start_router("--otlp-traces-endpoint", collector.url, "--trace-sample-ratio", "0", env=QUICK)
    engine = new_engine()
    router.add(engine)
    for header in (parent(), parent("00"), {**parent(), "traceparent": "nonsense"}):
        router.complete(headers=header)
    sampled, unsampled, new = [each for each in engine.received if each.method == "POST"]
    _, attempt = trace_of(collector, when=lambda spans: len(spans) == 2)
    assert sampled.header("traceparent") == f"00-{TRACE}-{attempt.span_id}-01"
    assert sampled.header("tracestate") == "vendor=1"
    assert [name.lower() for name, _ in sampled.headers].count("traceparent") == 1
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-00", unsampled.header("traceparent") or "")
    # The flag 2 is set: the router's trace ids are random.
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[02]", new.header("traceparent") or "")
    assert TRACE not in (new.header("traceparent") or "")
    assert new.header("tracestate") is None
    assert router.stop(signal.SIGTERM) == 0
    assert len(collector.spans) == 2


def test_waits_and_retries_are_spans_with_their_reasons(
    collector: Collector, start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router("--otlp-traces-endpoint", collector.url, env=QUICK)
    engines = [new_engine(str(number), number) for number in range(2)]
    router.add(*engines)
    behaviours = iter([closes, answers_status("503 Busy", extra=b"Retry-After: 1\r\n"), answers])
    for engine in engines:
        engine.behaviour = lambda received: next(behaviours)(received)
    # It waits because both replicas have failed it.
    assert router.complete(headers=parent()).status_code == 200
    root, *within = trace_of(collector, when=lambda spans: len(spans) == 5)
    assert (root.parent_id, root.failed) == (SPAN, False)
    assert [span.name for span in within] == ["attempt", "attempt", "queue", "attempt"]
    reasons = [span.attributes.get("error.type") for span in within]
    assert reasons == ["unanswered", "503", None, None]
    times = [time for span in within for time in (span.start, span.end)]
    assert [root.start, *times, root.end] == sorted([root.start, *times, root.end])


def test_reload_switches_traces_on(
    collector: Collector,
    start_router: Callable[..., RouterProcess],
    tmp_path: Path,
    new_engine: Callable[..., FakeEngine],
) -> None:
    live = LiveRouter(start_router, tmp_path / "flags", [], env=QUICK)
    engine = new_engine()
    live.router.add(engine)
    live.router.complete(headers=parent())
    live.write("--otlp-traces-endpoint", collector.url)
    assert live.reload() == "done"
    live.router.complete(headers=parent())
    unchanged, own = [each.header("traceparent") or "" for each in engine.received if each.method == "POST"]
    assert unchanged == parent()["traceparent"]
    attempt = next(
        span for span in trace_of(collector, when=lambda spans: len(spans) == 2) if span.name == "attempt"
    )
    assert own == f"00-{TRACE}-{attempt.span_id}-01"


@pytest.mark.parametrize("manner", ["hangs", "trickles", "is dead"])
def test_bad_collector_disturbs_neither_requests_nor_the_end(
    manner: str, start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    with ExitStack() as stack:
        if manner == "is dead":
            with socket.create_server(("127.0.0.1", 0)) as unused:
                url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        else:
            collector = stack.enter_context(collecting(manner))
            url = collector.url
        env = {**QUICK, "OTEL_EXPORTER_OTLP_TIMEOUT": "600", "OTEL_BSP_MAX_QUEUE_SIZE": "8"}
        env["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"] = "4"
        # No other limit than that of the last export ends the worker soon.
        router = start_router("--otlp-traces-endpoint", url, "--graceful-timeout-secs", "600", env=env)
        router.add(new_engine())
        assert {router.complete().status_code for _ in range(20)} == {200}
        if manner != "is dead":
            wait_until(lambda: collector.bodies, "the collector has spans")
        router.process.send_signal(signal.SIGTERM)
        assert router.process.wait(20) == 0
        log = router.log.read_text()
        assert "Traceback" not in log
        assert log.count("spans are lost") <= 1


def test_nothing_of_opentelemetry_is_imported_without_an_endpoint(
    trap: dict[str, str], start_router: Callable[..., RouterProcess], start_replica: Callable[..., ApiServer]
) -> None:
    router = start_router(env=trap)
    replica = start_replica(0, "--router", router.url, env=trap)
    wait_until(lambda: replica.url in router.urls(), "it is there", deadline=90)
    assert router.complete(headers=parent()).status_code == 200
    assert not Path(trap["TRAP_LOG"]).exists()
    wait_until(lambda: f" trace={TRACE} replica=" in router.log.read_text(), "the router's line")
    wait_until(lambda: f" trace={TRACE} POST " in replica.log(), "the replica's line")


def test_missing_extra_is_one_line_if_the_environment_asks_for_traces(
    trap: dict[str, str], start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    router = start_router(env={**trap, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
    router.add(new_engine())
    assert router.complete(headers=parent()).status_code == 200
    assert Path(trap["TRAP_LOG"]).exists()
    lines = [line for line in router.log.read_text().splitlines() if "no traces" in line]
    assert ["pip install 'fd-dp[otel]'" in line for line in lines] == [True]
