"""Access log: one line per request when it ends."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...common.trace_context import TraceContext, trace_label

if TYPE_CHECKING:
    from .request_trace import RequestTrace

_log = logging.getLogger("fastdeploy.access")


@dataclass(slots=True)
class AccessRecord:
    """Facts about one request, filled in while it is served. Times are seconds since `arrival`."""

    request_id: str
    method: str
    path: str
    arrival: float = field(default_factory=time.monotonic)
    status: int = 0
    prompt_tokens: int = 0
    #: Output tokens from another replica, which this one continues.
    resumed_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    #: Reason for an error status, or an error after the status had been sent.
    error: str | None = None
    #: The trace that it belongs to, if any.
    trace_context: TraceContext | None = None
    #: Its spans; None if they are not recorded.
    trace: RequestTrace | None = None

    @property
    def ids(self) -> str:
        """The ids of request and trace in log lines."""
        return self.request_id + trace_label(self.trace_context)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.arrival

    def log(self) -> None:
        parts = [f"request={self.ids}", f"{self.method} {self.path}", f"status={self.status}"]
        if self.prompt_tokens:
            parts += [f"prompt={self.prompt_tokens}", f"output={self.output_tokens}"]
        if self.resumed_tokens:
            parts.append(f"resumed={self.resumed_tokens}")
        if self.first_token_seconds is not None:
            parts.append(f"ttft={self.first_token_seconds:.3f}s")
        parts.append(f"duration={self.seconds:.3f}s")
        if self.finish_reasons:
            parts.append(f"finish={','.join(self.finish_reasons)}")
        if self.error:
            parts.append(f"error={self.error!r}")
        _log.info(" ".join(parts))
