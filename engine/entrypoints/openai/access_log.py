"""One line per request, when it is over: what was asked of this replica and how it went."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

_log = logging.getLogger("fastdeploy.access")


@dataclass(slots=True)
class AccessRecord:
    """Filled in as the request goes on. Times are seconds since `arrival`."""

    request_id: str
    method: str
    path: str
    arrival: float = field(default_factory=time.monotonic)
    status: int = 0
    prompt_tokens: int = 0
    #: Tokens of the output that another replica has sent.
    resumed_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    #: What went wrong after the status had been sent, or why there was no answer at all.
    error: str | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.arrival

    def log(self) -> None:
        parts = [f"request={self.request_id}", f"{self.method} {self.path}", f"status={self.status}"]
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
