"""Spans of requests, exported by OpenTelemetry's SDK. Its packages are imported only where traces are on."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .foreign_text import printable
from .trace_context import TraceContext
from .tracing_config import MISSING_EXTRA, TracingConfig

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)

#: Seconds that the last spans get at the end of a process.
_CLOSE_SECONDS = 1.0
_EXPORTER_LOGGER = "opentelemetry.exporter"
_HEADERS_LOGGER = "opentelemetry.util.re"

Attributes = Mapping[str, str | int | float | Sequence[str]]


def start_tracing(config: TracingConfig | None, service: str, instance: str = "") -> Tracing | None:
    """Return what records spans in this process, or None without a configuration.

    If the SDK cannot be used, log one line and return None: requests are served without traces. Call this
    after the last fork, because spans are exported by a thread.

    Args:
        service: name of the program, unless the environment has one.
        instance: which of several processes of this program it is.
    """
    if config is None:
        return None
    if config.obstacle:
        _log.warning("no traces: %s", config.obstacle)
        return None
    try:
        return Tracing(config, service, instance)
    except ImportError:
        _log.warning("no traces: %s", MISSING_EXTRA)
    except Exception as error:
        # The SDK reads many variables of the environment, and a wrong one must not prevent the start.
        _log.warning("no traces: OpenTelemetry cannot be started (%s)", printable(error))
    return None


class Tracing:
    """Records spans and exports them in a thread of its own. For any thread.

    A span that ends joins a bounded queue. If the collector does not take spans, the oldest are dropped.
    """

    def __init__(self, config: TracingConfig, service: str, instance: str) -> None:
        # These imports take a third of a second.
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        self._api = trace
        self._no_parent = Context()
        ratio = config.sample_ratio
        self._provider: TracerProvider = TracerProvider(
            sampler=None if ratio is None else ParentBasedTraceIdRatio(ratio),
            resource=_resource(service, instance),
            # `close` has a limit, the SDK's exit handler has none.
            shutdown_on_exit=False,
        )
        # Its messages contain headers with keys.
        logging.getLogger(_HEADERS_LOGGER).addFilter(_without_values)
        exporter = OTLPSpanExporter(endpoint=config.endpoint or None)
        self._provider.add_span_processor(BatchSpanProcessor(_reporting(exporter)))
        self._tracer = self._provider.get_tracer("fastdeploy")

    def serve(self, name: str, parent: TraceContext | None, state: str, attributes: Attributes) -> Span:
        """Start the span of a request that this process serves.

        Args:
            parent: the context in the request's headers; None begins a new trace.
            state: value of the header tracestate.
        """
        kind = self._api.SpanKind.SERVER
        return self._tracer.start_span(name, self._remote(parent, state), kind, attributes)

    def child(
        self,
        parent: Span,
        name: str,
        attributes: Attributes | None = None,
        *,
        is_call: bool = False,
        start_time: int | None = None,
    ) -> Span:
        """Start a span within `parent`.

        Args:
            is_call: it stands for a request to another process.
            start_time: Unix time in nanoseconds; None: now.
        """
        kind = self._api.SpanKind.CLIENT if is_call else self._api.SpanKind.INTERNAL
        context = self._api.set_span_in_context(parent, self._no_parent)
        return self._tracer.start_span(name, context, kind, attributes, start_time=start_time)

    def mark_failed(self, span: Span, kind: str) -> None:
        """Mark a span as failed; `kind` is a word for the failure, without any content of the request."""
        span.set_attribute("error.type", kind)
        span.set_status(self._api.StatusCode.ERROR)

    def close(self) -> None:
        """Export the last spans, for a second at most. Later spans are dropped."""
        # In a thread, because the SDK's limits do not cover a collector that sends its answer byte by byte.
        closing = threading.Thread(target=self._provider.shutdown, name="close-tracing", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def _remote(self, parent: TraceContext | None, state: str) -> Context:
        if parent is None:
            return self._no_parent
        api = self._api
        context = api.SpanContext(
            int(parent.trace_id, 16),
            int(parent.span_id, 16),
            is_remote=True,
            trace_flags=api.TraceFlags(parent.flags),
            trace_state=api.TraceState.from_header([state]) if state else None,
        )
        return api.set_span_in_context(api.NonRecordingSpan(context), self._no_parent)


def context_of(span: Span) -> TraceContext:
    """Return the context with which other processes continue the trace within `span`."""
    context = span.get_span_context()
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags))


def _resource(service: str, instance: str) -> Resource:
    """Return the attributes of this process; those in the environment win."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own: Attributes = {"service.name": service, "service.instance.id": instance, "process.pid": os.getpid()}
    return Resource.create(own).merge(OTELResourceDetector().detect())


def _reporting(exporter: SpanExporter) -> SpanExporter:
    """Return an exporter that logs when the collector stops taking spans and when it takes them again.

    The SDK would log each failed attempt, some of them with a stack trace.
    """
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    reason = _FirstMessage()
    library = logging.getLogger(_EXPORTER_LOGGER)
    library.handlers, library.propagate = [reason], False

    class Reporting(SpanExporter):
        works = True

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            reason.text = ""
            try:
                result = exporter.export(spans)
            except Exception as error:
                reason.text, result = repr(error), SpanExportResult.FAILURE
            if (works := result is SpanExportResult.SUCCESS) != self.works:
                self.works = works
                if works:
                    _log.info("traces: the collector takes spans again")
                else:
                    _log.warning(
                        "traces: spans are lost, the collector does not take them (%s)",
                        printable(reason.text),
                    )
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Reporting()


class _FirstMessage(logging.Handler):
    """Keeps the first message since `text` was cleared."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


def _without_values(record: logging.LogRecord) -> bool:
    record.args = ("(not shown)",)
    return True
