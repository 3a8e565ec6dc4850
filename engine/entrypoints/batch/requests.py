"""Lines of OpenAI's batch format: requests of an input file and results of an output file. No I/O."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from ...common.foreign_text import printable
from ...common.unserved import reason_of

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_NULL = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the input file. With a `problem` it cannot be sent, and that is its result."""

    custom_id: str | None
    path: str = ""
    body: bytes = b""
    problem: str = ""
    code: str = ""


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = _NULL


class _Body(msgspec.Struct):
    stream: Any = None


class _Result(msgspec.Struct):
    id: str
    custom_id: str | None


def read_request(line: bytes) -> Request:
    """Return the request in a line. It does not raise: a wrong line is a request with a problem."""
    try:
        found = msgspec.json.decode(line, type=_Line)
    except RecursionError:
        return Request(None, problem="the line is nested too deeply", code="invalid_json_line")
    except (msgspec.MsgspecError, UnicodeError) as error:
        return Request(
            None, problem=f"the line is not a JSON object ({printable(error)})", code="invalid_json_line"
        )
    custom_id = found.custom_id if isinstance(found.custom_id, str) else None
    problem = _problem(found)
    if problem:
        return Request(custom_id, problem=problem, code="invalid_request")
    return Request(custom_id, found.url, bytes(found.body))


def _problem(line: _Line) -> str:
    """Return what is wrong with a line; an empty string if nothing is."""
    if not isinstance(line.custom_id, str):
        return "custom_id is missing; it must be a string"
    if line.method != "POST":
        return f"method is {_shown(line.method)}; it must be POST"
    if line.url not in PATHS:
        reason = reason_of(line.url) if isinstance(line.url, str) else None
        return f"url is {_shown(line.url)}; " + (reason or f"it must be one of {', '.join(PATHS)}")
    try:
        body = msgspec.json.decode(line.body, type=_Body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return "body is missing; it must be a JSON object"
    if body.stream not in (None, False):
        return "body.stream is set; a batch has no streams, leave it out"
    return ""


def _shown(value: Any) -> str:
    return "missing" if value is None else printable(repr(value), 100)


def result_line(request: Request, status: int, request_id: str, body: bytes) -> bytes:
    """Return the line of the output file for a response."""
    try:
        # One line, whatever the server has sent.
        compact = msgspec.json.format(body, indent=-1)
    except (msgspec.MsgspecError, RecursionError):
        return _line(request, None, {"code": "invalid_response", "message": "the response is not JSON"})
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(compact)}
    return _line(request, response, None)


def problem_line(request: Request) -> bytes:
    """Return the line of the output file for a request that cannot be sent."""
    return _line(request, None, {"code": request.code, "message": request.problem})


def read_result(line: bytes) -> str | None:
    """Return the custom_id in a line of an output file. Raises ValueError."""
    try:
        return msgspec.json.decode(line, type=_Result).custom_id
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _line(request: Request, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    result = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request.custom_id,
        "response": response,
        "error": error,
    }
    return msgspec.json.encode(result) + b"\n"
