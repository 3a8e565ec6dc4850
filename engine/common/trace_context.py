"""W3C Trace Context: the headers that carry a trace from process to process. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

_SAMPLED = 1
#: Flags of version 00: sampled, and a trace id of random digits.
_KNOWN_FLAGS = 3
#: Later versions may append fields after another hyphen.
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)


class TraceContext(NamedTuple):
    """A trace, and the span in it to which the next one belongs."""

    #: 32 and 16 hexadecimal digits.
    trace_id: str
    span_id: str
    flags: int

    @property
    def is_sampled(self) -> bool:
        """True if the spans of this trace are recorded."""
        return bool(self.flags & _SAMPLED)

    @property
    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def trace_label(context: TraceContext | None) -> str:
    """Return what follows a request's id in log lines: its trace, if there is one."""
    return "" if context is None else f" trace={context.trace_id}"


def parse_traceparent(value: str) -> TraceContext | None:
    """Return the context in the value of a traceparent header, or None if it is invalid."""
    form = _FORM.fullmatch(value.strip(" \t"))
    if form is None:
        return None
    version, trace_id, span_id, flags, rest = form.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceContext(trace_id, span_id, int(flags, 16) & _KNOWN_FLAGS)
