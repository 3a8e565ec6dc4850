"""Start and end of OpenTelemetry's SDK in a process."""

from __future__ import annotations

import logging
import os

import pytest

from fastdeploy.common.tracing import Tracing, start_tracing
from fastdeploy.common.tracing_config import TracingConfig

from ..collector import Collector, collecting
from ..waiting import wait_until


def started(endpoint: str) -> Tracing:
    tracing = start_tracing(TracingConfig(f"{endpoint}/v1/traces"), "test", "1")
    assert tracing is not None
    return tracing


def test_headers_of_the_environment_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "my secret key")
    started("http://127.0.0.1:1").close()
    assert "Header format invalid" in caplog.text
    assert "secret" not in caplog.text


def test_wrong_variable_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "100000")
    assert start_tracing(TracingConfig("http://127.0.0.1:1/v1/traces"), "test", "1") is None
    assert "no traces: OpenTelemetry cannot be started" in caplog.text


def test_collector_that_fails_and_returns_is_two_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    caplog.set_level(logging.INFO)
    with collecting("refuses") as collector:
        tracing = started(collector.url)
        for manner, line in (("refuses", "spans are lost"), ("takes", "takes spans again")):
            collector.manner = manner
            for _ in range(3):
                before = len(collector.bodies)
                tracing.serve("request", None, "", {}).end()
                wait_until(lambda before=before: len(collector.bodies) > before, deadline=20)
            wait_until(lambda line=line: line in caplog.text, deadline=20)
        tracing.close()
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2, lines
    assert "403" in lines[0]


def test_child_process_does_not_export_the_spans_of_its_parent() -> None:
    with collecting() as collector:
        tracing = started(collector.url)
        tracing.serve("of the parent", None, "", {}).end()
        child = os.fork()
        if child == 0:
            tracing.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert names(collector) == []
        tracing.close()
        assert names(collector) == ["of the parent"]


def names(collector: Collector) -> list[str]:
    return [span.name for span in collector.spans]
