"""The Flask application of a replica. Processes, ports and signals are in serve.py."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from ...common.cors import CorsPolicy, refusal_of
from ...common.errors import FastDeployError, RequestError
from ...common.resumption import RESUME_PATH, Resumption, decode_resumption
from ..metrics import ReplicaMetrics
from . import incoming
from .access_log import AccessRecord
from .answer import Answer
from .chat import chat_completion, chat_events, chat_prompts
from .completions import completion, completion_events, completion_prompts
from .errors import ApiError
from .events import event_stream
from .fields import decode_object
from .progress import Progress
from .protocol import ChatRequest, CompletionRequest
from .replica import Replica

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_log = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
_SLASHES = re.compile(r"//+")
#: Characters of a path in an error.
_LONGEST_PATH = 200


def create_app(replica: Replica) -> Flask:
    app = Flask("fastdeploy", static_folder=None)
    # Otherwise FLASK_DEBUG decides.
    app.debug = False
    app.config["MAX_CONTENT_LENGTH"] = replica.config.max_body_bytes
    # No redirects: they name the address of the replica, which clients of the router cannot reach.
    app.url_map.merge_slashes = False
    app.wsgi_app = _OneSlash(app.wsgi_app)  # type: ignore[method-assign]

    @app.before_request
    def begin() -> Response | None:
        g.record = AccessRecord(incoming.request_id(), request.method, _path())
        #: What this request holds, until its last byte has been sent.
        g.resources = ExitStack()
        if incoming.is_preflight():
            return _preflight(replica.config.cors)
        if request.path.startswith("/v1") and request.method != "OPTIONS":
            incoming.authorize_client(replica.config.api_keys)
        return None

    @app.after_request
    def finish(response: Response) -> Response:
        record: AccessRecord = g.record
        record.status = response.status_code
        response.headers["X-Request-Id"] = record.request_id
        if "Origin" in request.headers and request.path.startswith("/v1/") and not incoming.is_preflight():
            response.headers.update(replica.config.cors.headers(request.headers["Origin"]))
        # Not left to a `finally` of the stream: a generator that was never started runs none.
        response.call_on_close(g.resources.close)
        if request.path.startswith(("/v1", RESUME_PATH)):
            response.call_on_close(record.log)
        return response

    @app.post(CHAT_PATH)
    def chat_completions() -> Response:
        g.resources.enter_context(replica.admitted())
        return _chat(replica, incoming.read_body())

    @app.post(COMPLETIONS_PATH)
    def completions() -> Response:
        g.resources.enter_context(replica.admitted())
        return _completion(replica, incoming.read_body())

    @app.post(RESUME_PATH)
    def resume() -> Response:
        incoming.authorize_router(replica.identity.token)
        g.resources.enter_context(replica.admitted())
        # The client's body was small enough for another replica; now tokens come with it.
        request.max_content_length = None
        resumption = decode_resumption(incoming.read_body("application/msgpack"))
        if resumption.path not in _GENERATIONS:
            raise ApiError(409, f"nothing at {quote(resumption.path[:100])} can be resumed")
        return _GENERATIONS[resumption.path](replica, resumption.body, resumption)

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
        response = _error(ApiError(error.code or 500, f"{request.method} {_sent_path()}: {error.name}"))
        if "Allow" in (headers := dict(error.get_headers())):
            response.headers["Allow"] = headers["Allow"]
        return response

    @app.errorhandler(Exception)
    def unknown_error(error: Exception) -> Response:
        _log.exception("request=%s failed in an unforeseen way", g.record.request_id, exc_info=error)
        return _error(ApiError(500, "internal error; the server's log has the details"))

    return app


class _OneSlash:
    """WSGI middleware: several slashes in a path count as one, as in the router."""

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["PATH_INFO"] = _SLASHES.sub("/", environ["PATH_INFO"])
        return self._application(environ, start_response)


def _chat(replica: Replica, data: bytes, resumption: Resumption | None = None) -> Response:
    body = ChatRequest.parse(decode_object(data), replica.defaults)
    replica.require_model(body.model)
    created, progress = _created(resumption), incoming.progress(replica.engine)
    prompts = chat_prompts(replica, body, created, progress)
    answer = _answer(replica, body, prompts, created, progress, resumption)
    return event_stream(chat_events(answer), g.record) if body.stream else _json(chat_completion(answer))


def _completion(replica: Replica, data: bytes, resumption: Resumption | None = None) -> Response:
    body = CompletionRequest.parse(decode_object(data), replica.defaults)
    replica.require_model(body.model)
    created, progress = _created(resumption), incoming.progress(replica.engine)
    answer = _answer(replica, body, completion_prompts(replica, body), created, progress, resumption)
    if body.stream:
        return event_stream(completion_events(answer, body), g.record)
    return _json(completion(answer, body))


#: What can be resumed.
_GENERATIONS = {CHAT_PATH: _chat, COMPLETIONS_PATH: _completion}


def _created(resumption: Resumption | None) -> int:
    return int(time.time()) if resumption is None else resumption.created


def _answer(
    replica: Replica,
    body: ChatRequest | CompletionRequest,
    prompts: list[list[int]],
    created: int,
    progress: Progress | None,
    resumption: Resumption | None,
) -> Answer:
    if body.request_id is not None:
        if not incoming.REQUEST_ID.fullmatch(body.request_id):
            raise RequestError("request_id may have letters, digits and . : @ / + = - _ only", "request_id")
        g.record.request_id = body.request_id
    seed = body.seed if body.seed is not None else incoming.header_seed()
    # Another replica has to draw the same tokens, and log probabilities that are not out are not known there.
    is_resumable = seed is not None and (body.stream or body.logprobs is None)
    if resumption is not None and not is_resumable:
        what = "a seed" if seed is None else "its log probabilities so far"
        raise ApiError(409, f"an answer cannot be resumed without {what}")
    answer = Answer(
        replica,
        body,
        prompts,
        record=g.record,
        seed=(secrets.randbits(63) if seed is None else seed) & incoming.MAX_SEED,
        created=created,
        client=incoming.client_socket(),
        marked=is_resumable and incoming.wants_marks(),
        progress=progress,
        resumption=resumption,
    )
    return g.resources.enter_context(answer)


def _preflight(policy: CorsPolicy) -> Response:
    """Return the answer to a preflight. It needs no key, because browsers send none with it."""
    origin, wanted = request.headers["Origin"], request.headers.get("Access-Control-Request-Headers", "")
    if policy.allows(origin):
        response = Response(status=204)
    else:
        response = _error(ApiError(403, refusal_of(origin), code="origin_not_allowed"))
    response.headers.update(policy.preflight_headers(origin, wanted))
    return response


def _path() -> str:
    """In one line: decoded, as Flask has it, a path may hold line breaks."""
    return quote(request.path)


def _sent_path() -> str:
    """Return the path as the client wrote it. Werkzeug's has one slash where there were several."""
    sent: str = request.environ.get("RAW_URI", _path())
    return quote(sent.partition("?")[0][:_LONGEST_PATH], safe="/%:@!$&'()*+,;=~")


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
