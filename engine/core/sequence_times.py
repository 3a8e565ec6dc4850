"""Times of traced sequences: when each was first scheduled, and when its tokens were drawn."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from ..common.messages import AddRequest, Times, TokenOutput
from ..common.request import Batch
from ..common.trace_context import parse_traceparent

_WAITS = 0


class SequenceTimes:
    """False while no sequence is traced, so that steps need not call it."""

    def __init__(self) -> None:
        #: Request id -> Unix time of its first step in nanoseconds, or `_WAITS`.
        self._scheduled: dict[str, int] = {}
        #: Sequences that have had an output.
        self._begun: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._scheduled)

    def add(self, request: AddRequest) -> None:
        context = parse_traceparent(request.traceparent)
        if context is not None and context.is_sampled:
            self._scheduled[request.request_id] = _WAITS

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._scheduled.pop(request_id, None)
            self._begun.discard(request_id)

    def begin_step(self, batch: Batch) -> None:
        now = time.time_ns()
        for row in batch.rows:
            if self._scheduled.get(row.sequence.request_id) == _WAITS:
                self._scheduled[row.sequence.request_id] = now

    def added_to(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        """Return the outputs of a step, with times in the first and the last one of a traced sequence."""
        now = time.time_ns()
        return [self._timed(output, now) for output in outputs]

    def _timed(self, output: TokenOutput, now: int) -> TokenOutput:
        request_id, is_last = output.request_id, output.finish_reason is not None
        scheduled = self._scheduled.get(request_id)
        if scheduled is None or (request_id in self._begun and not is_last):
            return output
        self._begun.add(request_id)
        if is_last:
            self.forget([request_id])
        return msgspec.structs.replace(output, times=Times(scheduled, now))
