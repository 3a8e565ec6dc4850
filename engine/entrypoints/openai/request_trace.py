"""The spans of one request in a replica: the request, its tokenization, and queue, prefill and decode.

Queue, prefill and decode are by the times of the worker. Spans have no content of requests and responses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...common.messages import Times
from ...common.trace_context import TraceContext
from ...common.tracing import Tracing
from .access_log import AccessRecord
from .protocol import ChatRequest, GenerationRequest

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_MAX_NAME = 200


class RequestTrace:
    """For the thread that serves the request, which must call `end`."""

    def __init__(
        self, tracing: Tracing, record: AccessRecord, route: str, parent: TraceContext | None, state: str
    ) -> None:
        attributes = {"http.request.method": record.method, "fd.request.id": record.request_id}
        name = record.method
        if route:
            name, attributes["http.route"] = f"{name} {route}", route
        self._tracing = tracing
        self.span = tracing.serve(name, parent, state, attributes)
        #: Unix times in nanoseconds; 0: not yet.
        self._submitted = self._first_drawn = self._last_drawn = 0
        self._unfinished = 0
        self._is_over = False

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Record the block as the time in which the prompt is rendered and tokenized."""
        span = self._tracing.child(self.span, "tokenize")
        try:
            yield
        finally:
            span.end()

    def submit(self, request: GenerationRequest, model: str, response_id: str, num_sequences: int) -> None:
        """Begin the wait for the worker."""
        self._submitted, self._unfinished = time.time_ns(), num_sequences
        attributes = {
            "gen_ai.operation.name": "chat" if isinstance(request, ChatRequest) else "text_completion",
            "gen_ai.provider.name": "fastdeploy",
            "gen_ai.request.model": (request.model or model)[:_MAX_NAME],
            "gen_ai.request.stream": request.stream,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.response.model": model,
            "gen_ai.response.id": response_id,
        }
        if request.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = request.max_tokens
        if request.n > 1:
            attributes["gen_ai.request.choice.count"] = request.n
        self.span.set_attributes(attributes)

    def drawn(self, times: Times, *, is_last: bool, num_cached: int) -> None:
        """Take the worker's times of the first or the last token of a choice."""
        if not self._first_drawn:
            self._first_drawn = times.drawn
            scheduled = times.scheduled or times.drawn
            self._child("queue", self._submitted, scheduled)
            prefill = self._tracing.child(self.span, "prefill", start_time=scheduled)
            prefill.set_attribute("gen_ai.usage.cache_read.input_tokens", num_cached)
            prefill.end(times.drawn)
        self._last_drawn = times.drawn
        self._unfinished -= is_last

    def end(self, record: AccessRecord) -> None:
        """End the request when the last byte of the response has been sent. Later calls have no effect."""
        if self._is_over:
            return
        self._is_over = True
        if self._first_drawn:
            # The worker does not see the end of a choice at a stop string, or with its client.
            self._child("decode", self._first_drawn, time.time_ns() if self._unfinished else self._last_drawn)
        span = self.span
        span.set_attribute("http.response.status_code", record.status)
        if record.prompt_tokens:
            span.set_attribute("gen_ai.usage.input_tokens", record.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", record.output_tokens)
            span.set_attribute("gen_ai.response.finish_reasons", record.finish_reasons)
        if record.resumed_tokens:
            span.set_attribute("fd.resumed_tokens", record.resumed_tokens)
        if record.status >= 500:
            self._tracing.mark_failed(span, str(record.status))
        elif record.status == 200 and record.error is not None:
            self._tracing.mark_failed(span, "incomplete response")
        span.end()

    def _child(self, name: str, start: int, end: int) -> None:
        span: Span = self._tracing.child(self.span, name, start_time=start)
        span.end(max(start, end))
