"""The Flask application of a replica. Processes, ports and signals are in serve.py."""

from __future__ import annotations

import hmac
import itertools
import logging
import re
import secrets
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import msgspec
from flask import Flask, Response, g, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge

from ...errors import FastDeployError, RequestError
from ...metrics import ReplicaMetrics
from .access_log import AccessRecord
from .answer import Answer
from .chat import chat_chunks, chat_completion, chat_prompts
from .completions import completion, completion_chunks, completion_prompts
from .engine_client import ClientGone
from .errors import ApiError
from .fields import decode_object
from .protocol import ChatRequest, CompletionRequest
from .replica import Replica

_log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
_MAX_SEED = 2**63 - 1
#: Of a body that is too large 64 MiB more are read and thrown away.
_PIECE, _DISCARDED_PIECES = 1 << 20, 64
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(replica: Replica) -> Flask:
    app = Flask("fastdeploy")
    app.config["MAX_CONTENT_LENGTH"] = replica.config.max_body_bytes

    @app.before_request
    def begin() -> None:
        g.record = AccessRecord(_request_id(), request.method, _path())
        #: What this request holds, until its last byte has been sent.
        g.resources = ExitStack()
        if request.path.startswith("/v1") and request.method != "OPTIONS":
            _authorize(replica.config.api_keys)

    @app.after_request
    def finish(response: Response) -> Response:
        record: AccessRecord = g.record
        record.status = response.status_code
        response.headers["X-Request-Id"] = record.request_id
        # Not left to a `finally` of the stream: a generator that was never started runs none.
        response.call_on_close(g.resources.close)
        if request.path.startswith("/v1"):
            response.call_on_close(record.log)
        return response

    @app.post("/v1/chat/completions")
    def chat_completions() -> Response:
        g.resources.enter_context(replica.admitted())
        body = ChatRequest.parse(_body(replica.config.max_body_bytes), replica.defaults)
        replica.require_model(body.model)
        answer = _answer(replica, body, chat_prompts(replica, body))
        return _stream(chat_chunks(answer)) if body.stream else _json(chat_completion(answer))

    @app.post("/v1/completions")
    def completions() -> Response:
        g.resources.enter_context(replica.admitted())
        body = CompletionRequest.parse(_body(replica.config.max_body_bytes), replica.defaults)
        replica.require_model(body.model)
        answer = _answer(replica, body, completion_prompts(replica, body))
        return _stream(completion_chunks(answer, body)) if body.stream else _json(completion(answer, body))

    @app.get("/v1/models")
    def models() -> Response:
        return _json({"object": "list", "data": [_model_card(replica)]})

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        replica.require_model(name)
        return _json(_model_card(replica))

    @app.get("/health")
    @app.route("/ping", methods=["GET", "POST"])
    def health() -> Response:
        status, body = replica.health()
        return _json(body, status)

    if replica.config.metrics_port is None:

        @app.get("/metrics")
        def metrics() -> Response:
            return Response(replica.metrics.render(), content_type=ReplicaMetrics.content_type)

    @app.errorhandler(FastDeployError)
    def known_error(error: FastDeployError) -> Response:
        g.record.error = str(error)
        return _error(ApiError.of(error))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        response = _error(ApiError(error.code or 500, f"{request.method} {_path()}: {error.name}"))
        if "Allow" in (headers := dict(error.get_headers())):
            response.headers["Allow"] = headers["Allow"]
        return response

    @app.errorhandler(Exception)
    def unknown_error(error: Exception) -> Response:
        _log.exception("request=%s failed in an unforeseen way", g.record.request_id, exc_info=error)
        return _error(ApiError(500, "internal error; the server's log has the details"))

    return app


def _answer(replica: Replica, body: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> Answer:
    if body.request_id is not None:
        if not _REQUEST_ID.fullmatch(body.request_id):
            raise RequestError("request_id may have letters, digits and . : @ / + = - _ only", "request_id")
        g.record.request_id = body.request_id
    seed = body.seed if body.seed is not None else _header_seed()
    answer = Answer(
        replica,
        body,
        prompts,
        record=g.record,
        seed=(secrets.randbits(63) if seed is None else seed) & _MAX_SEED,
        client=request.environ.get("gunicorn.socket"),
    )
    return g.resources.enter_context(answer)


def _stream(chunks: Iterator[dict[str, Any]]) -> Response:
    """Server-sent events."""
    # Waits for it here, so that an error before the first token gets a status of its own: by a 503 a router
    # knows that it can ask another replica.
    first = next(chunks)
    events = _events(itertools.chain([first], chunks), g.record)
    return Response(events, mimetype="text/event-stream", headers=_SSE_HEADERS)


def _events(chunks: Iterator[dict[str, Any]], record: AccessRecord) -> Iterator[bytes]:
    try:
        for chunk in chunks:
            yield _event(chunk)
    except ClientGone:
        return
    except FastDeployError as error:
        record.error = str(error)
        yield _event(ApiError.of(error).body)
    except Exception as error:
        record.error = "internal error"
        _log.exception("request=%s failed in an unforeseen way", record.request_id, exc_info=error)
        yield _event(ApiError(500, "internal error; the server's log has the details").body)
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _body(max_bytes: int) -> dict[str, Any]:
    """The request's JSON object, read whole."""
    if request.mimetype and request.mimetype != "application/json":
        raise RequestError(f"Content-Type is {request.mimetype!r}; it must be 'application/json'")
    try:
        data = request.get_data(cache=False)
    except RequestEntityTooLarge:
        # Most clients look at the answer only when they have sent everything.
        stream = request.environ["wsgi.input"]
        for _ in range(_DISCARDED_PIECES):
            if not stream.read(_PIECE):
                break
        raise ApiError(413, f"the body is larger than {max_bytes} bytes (--max-body-bytes)") from None
    except ClientDisconnected as error:
        # What Werkzeug makes of any trouble with the socket; here of the worker's limit (http_worker.py).
        if isinstance(error.__context__, BlockingIOError):
            raise ApiError(408, "the body did not arrive in time") from None
        raise RequestError("the body ended before its Content-Length") from None
    except (OSError, ParseException) as error:
        raise RequestError(f"the body cannot be read: {error}") from None
    return decode_object(data)


def _path() -> str:
    """In one line: decoded, as Flask has it, a path may hold line breaks."""
    return quote(request.path)


def _request_id() -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _header_seed() -> int | None:
    given = request.headers.get("X-FD-Seed")
    if given is None:
        return None
    if not given.isascii() or not given.isdecimal() or len(given) > 19 or int(given) > _MAX_SEED:
        raise RequestError(f"X-FD-Seed must be an integer between 0 and {_MAX_SEED}", "X-FD-Seed")
    return int(given)


def _authorize(keys: tuple[str, ...]) -> None:
    if not keys:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # All keys are compared, each in constant time: how long it takes tells nothing about any of them.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")


def _model_card(replica: Replica) -> dict[str, Any]:
    name = replica.config.served_model_name
    return {
        "id": name,
        "object": "model",
        "created": replica.created,
        "owned_by": "FastDeploy",
        "root": str(replica.config.engine.model),
        "parent": None,
        "max_model_len": replica.config.engine.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": replica.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, mimetype="application/json")


def _error(error: ApiError) -> Response:
    response = _json(error.body, error.status)
    response.headers.update(error.headers)
    return response
