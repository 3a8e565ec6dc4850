"""The tools of the router benchmark are correct: mock engines, stream readers and processor time."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from benchmarks.mock_engines import MockEngines
from benchmarks.process_cost import cpu_seconds, pss_bytes, spent
from benchmarks.router_cases import UnaryCase
from benchmarks.router_contenders import DIRECT
from benchmarks.router_load import LoadError, run_sse_load, unary
from benchmarks.router_report import Findings, rows_of
from fastdeploy.common.resumption import Delivered, marks_of

from ..router.fake_engine import EVENT_HEAD, FakeEngine, Received, answers_status

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def engines() -> Iterator[MockEngines]:
    with MockEngines(interval_ms=5) as engines:
        yield engines


@pytest.fixture
def faulty() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.stop()


def chat(url: str, headers: dict[str, str] | None = None, **fields: object) -> requests.Response:
    body = {"model": "mock", "messages": [], **fields}
    return requests.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=10)


def blocks(engines: MockEngines, count: int, headers: dict[str, str] | None = None) -> list[str]:
    answer = chat(engines.urls[0], headers, stream=True, max_tokens=count)
    return answer.text.removesuffix("\n\n").split("\n\n")


def test_each_engine_answers_with_its_own_300_bytes_of_json(engines: MockEngines) -> None:
    answers = [chat(url) for url in engines.urls]
    assert [len(answer.content) for answer in answers] == [300] * 8
    assert len({answer.json()["system_fingerprint"] for answer in answers}) == 8


def test_an_engine_answers_request_after_request_on_one_connection(engines: MockEngines) -> None:
    with requests.Session() as session:
        for stream in (False, True, False):
            answer = session.post(
                f"{engines.urls[0]}/v1/chat/completions",
                json={"stream": stream, "max_tokens": 3},
                timeout=10,
            )
            assert answer.status_code == 200
        assert "connection" not in answer.headers


def test_a_stream_has_as_many_events_as_asked_for_numbered_and_timed(engines: MockEngines) -> None:
    *events, done = blocks(engines, 5)
    assert done == "data: [DONE]"
    found = [re.search(r'"content":"(\d{20}) (\d{5})"', event) for event in events]
    times, numbers = zip(*[(int(match[1]), int(match[2])) for match in found if match], strict=True)
    assert numbers == (0, 1, 2, 3, 4)
    assert all(earlier < later for earlier, later in itertools.pairwise(times))


def test_without_the_header_there_are_no_marks(engines: MockEngines) -> None:
    assert not any("\n: fd" in block for block in blocks(engines, 3))


def test_marks_have_the_format_of_a_resumption(engines: MockEngines) -> None:
    *events, done = blocks(engines, 4, {"X-FD-Marks": "1"})
    lines = [event.rpartition("\n: fd ")[2].encode() for event in events]
    assert lines[0] == b"0"
    assert marks_of(lines) == {0: Delivered([100001, 100002, 100003], finished=True)}
    assert "\n" not in done


def test_readers_count_every_chunk_of_every_stream(engines: MockEngines, tmp_path: Path) -> None:
    before = engines.stats()["streams"]
    begun: list[bool] = []
    found = run_sse_load(
        engines.ports[0],
        tmp_path,
        count=20,
        chunks=10,
        rounds=3,
        ramp_ms=50,
        when_begun=lambda: begun.append(True),
    )
    assert (found["streams"], found["chunks"], found["errors"]) == (60, 600, 0)
    assert engines.stats()["streams"] == before + 60
    assert begun == [True]
    assert 0 < found["delay_ms"]["p50"] <= found["delay_ms"]["p99"] <= found["delay_ms"]["max"]


def event(number: int, rest: str = "") -> bytes:
    return f'data: {{"content":"{1:020} {number:05}"}}\n{rest}\n'.encode()


DONE = b"data: [DONE]\n\n"


def sends_events(*events: bytes, end: bytes = b"0\r\n\r\n") -> Callable[[Received], bool]:
    def behave(received: Received) -> bool:
        received.send(EVENT_HEAD)
        for data in events:
            received.send_chunk(data)
        received.send(end)
        return False

    return behave


def in_single_bytes(received: Received) -> bool:
    received.send(EVENT_HEAD)
    whole = b"".join(b"%x;a=b\r\n%s\r\n" % (len(data), data) for data in (event(0), event(1) + DONE))
    for byte in whole + b"0\r\nTrailer: yes\r\n\r\n":
        received.send(bytes([byte]))
    return True


def test_reader_accepts_any_split_of_a_stream(faulty: FakeEngine, tmp_path: Path) -> None:
    faulty.behaviour = in_single_bytes
    assert run_sse_load(faulty.port, tmp_path, count=2, chunks=2, rounds=2)["chunks"] == 8


def test_comments_between_events_are_no_events(faulty: FakeEngine, tmp_path: Path) -> None:
    faulty.behaviour = sends_events(event(0), b":\n\n", b": resumed\n\n", event(1), DONE)
    assert run_sse_load(faulty.port, tmp_path, count=1, chunks=2)["chunks"] == 2


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (sends_events(event(0), event(2), DONE), "event 1 is"),
        (sends_events(event(0), event(0), event(1), DONE), "event 1 is"),
        (sends_events(event(0), DONE), "ended after event 1"),
        (sends_events(event(0), event(1)), "ended after event 2"),
        (sends_events(event(0), event(1), end=b""), "closed within a stream"),
        (sends_events(event(0, ": fd 0\n"), event(1), DONE), "a mark has come through"),
        (sends_events(event(0), b": fd 0\n\n", event(1), DONE), "not an event"),
        (sends_events(event(0), end=b"what?\r\n"), "not a chunked body"),
        (answers_status("503 Service Unavailable"), "HTTP/1.1 503 Service Unavailable"),
        (answers_status("200 OK"), "not chunked"),
    ],
)
def test_reader_reports_an_invalid_stream(
    faulty: FakeEngine, tmp_path: Path, behaviour: Callable[[Received], bool], why: str
) -> None:
    faulty.behaviour = behaviour
    with pytest.raises(LoadError, match=re.escape(why)):
        run_sse_load(faulty.port, tmp_path, count=1, chunks=2)


needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")


@needs_wrk
def test_requests_reach_the_engine_and_are_measured(engines: MockEngines, tmp_path: Path) -> None:
    before = engines.stats()["requests"][0]
    found = unary(engines.ports[0], None, connections=4, seconds=1, directory=tmp_path)
    assert engines.stats()["requests"][0] > before
    assert 0 < found.p50_ms <= found.p99_ms
    assert found.rps > 0


@needs_wrk
def test_refused_requests_have_no_result(faulty: FakeEngine, tmp_path: Path) -> None:
    faulty.behaviour = answers_status("429 Too Many Requests")
    with pytest.raises(LoadError, match="were refused"):
        unary(faulty.port, None, connections=1, seconds=1, directory=tmp_path)


def test_cpu_time_includes_all_descendants() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    child = subprocess.Popen(
        ["/bin/sh", "-c", f'{sys.executable} -c "{burn}"; :'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    before = cpu_seconds(child.pid)
    assert child.stdout is not None
    assert child.stdout.readline() == "done\n"
    assert spent(before, cpu_seconds(child.pid)) > 0.2
    assert pss_bytes(child.pid) > 1 << 20
    child.communicate("\n")


def figures(**changes: float) -> dict[str, float]:
    return {"rps": 100.0, "p50_ms": 1.0, "cpu_us": 10.0, **changes}


def test_rows_compare_latency_added_by_routers() -> None:
    case, findings = UnaryCase(64), Findings()
    findings.add(case, DIRECT, figures(rps=1000.0))
    for p50 in (3.0, 9.0, 5.0):
        findings.add(case, "ours", figures(p50_ms=p50))
    findings.add(case, "vllm", figures(p50_ms=3.0, cpu_us=40.0))
    rows = {row.case: row for row in rows_of([case], findings)}
    assert (rows["unary_p50_ms_c64_vs_vllm"].ours, rows["unary_p50_ms_c64_vs_vllm"].peer) == (4.0, 2.0)
    assert (rows["unary_cpu_us_c64_vs_vllm"].ours, rows["unary_cpu_us_c64_vs_vllm"].peer) == (10.0, 40.0)
    assert rows["unary_rps_c64_vs_vllm"].limit == 1000.0


def test_router_that_failed_once_has_no_result() -> None:
    case, findings = UnaryCase(64), Findings()
    for contender in (DIRECT, "ours", "vllm", "nginx"):
        findings.add(case, contender, figures())
    findings.fail(case, "vllm", "of 9 requests 1 were refused")
    assert {row.peer_name for row in rows_of([case], findings)} == {"nginx"}
    findings.fail(case, "ours", "ended")
    assert list(rows_of([case], findings)) == []
