"""Responses as server-sent events."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from flask import Response

from ...common.errors import FastDeployError
from .access_log import AccessRecord
from .engine_client import ClientGone
from .errors import ApiError

_log = logging.getLogger(__name__)

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_KEEP_ALIVE = b":\n\n"

#: The data, and the mark: a comment line for the router (see resumption.py), or empty.
Event = tuple[dict[str, Any], bytes]


def event_stream(events: Iterator[Event | None], record: AccessRecord, *, typed: bool = False) -> Response:
    """Return the streaming response; None in `events` becomes a keep-alive.

    Args:
        typed: each event begins with a line that has the type in its data.
    """
    # Wait for the first event, so that an earlier error has its own HTTP status: a router retries a 503 at
    # another replica. A resumed stream may have no events left.
    first = list(itertools.islice(events, 1))
    body = _encoded(itertools.chain(first, events), record, _typed_block if typed else _block)
    return Response(body, mimetype="text/event-stream", headers=_HEADERS)


def _encoded(
    events: Iterator[Event | None], record: AccessRecord, block: Callable[..., bytes]
) -> Iterator[bytes]:
    try:
        for event in events:
            yield _KEEP_ALIVE if event is None else block(*event)
    except ClientGone:
        return
    except FastDeployError as error:
        record.error = str(error)
        yield _block(ApiError.of(error).body)
    except Exception as error:
        record.error = "internal error"
        _log.exception("request=%s: unexpected exception", record.ids, exc_info=error)
        yield _block(ApiError(500, "internal error; the server's log has the details").body)
    yield b"data: [DONE]\n\n"


def _block(data: dict[str, Any], mark: bytes = b"") -> bytes:
    return b"data: %b\n%b\n" % (msgspec.json.encode(data), mark)


def _typed_block(data: dict[str, Any], mark: bytes) -> bytes:
    return b"event: %b\n%b" % (data["type"].encode(), _block(data, mark))
