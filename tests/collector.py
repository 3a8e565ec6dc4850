"""An OTLP collector for tests: takes spans over HTTP, or misbehaves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A span as a collector sees it. Ids are hexadecimal, times are Unix times in nanoseconds."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]


class Collector:
    """Serves in a thread.

    `manner`: "takes", "refuses", "hangs", or "trickles": it answers byte by byte, without end.
    """

    def __init__(self, manner: str = "takes") -> None:
        self.manner = manner
        self.spans: list[Span] = []
        #: Bodies as they were received.
        self.bodies: list[bytes] = []
        self.is_over = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.bodies.append(body)
                if collector.manner == "hangs":
                    collector.is_over.wait()
                    return
                if collector.manner == "trickles":
                    with contextlib.suppress(OSError):
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                        while not collector.is_over.wait(0.05):
                            self.wfile.write(b"x")
                    return
                assert self.path == "/v1/traces", self.path
                if collector.manner == "takes":
                    collector.spans += _spans_in(body)
                self.send_response(200 if collector.manner == "takes" else 403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def trace(self, trace_id: str) -> list[Span]:
        """Return the spans of a trace in the order in which they began."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.start)

    def close(self) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def collecting(manner: str = "takes") -> Iterator[Collector]:
    collector = Collector(manner)
    try:
        yield collector
    finally:
        collector.close()


def _spans_in(body: bytes) -> Iterator[Span]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = _values(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    service,
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code == 2,
                    _values(span.attributes),
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return (
        [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)
    )
