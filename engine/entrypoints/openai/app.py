"""Flask application of a replica. Processes, ports and signals are in serve.py."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from ...common.api_paths import is_for_pages, needs_key
from ...common.cors import CorsPolicy, refusal_of
from ...common.errors import FastDeployError, RequestError
from ...common.resumption import RESUME_PATH, Resumption, decode_resumption
from ...common.tracing import context_of
from ...common.unserved import reason_of
from ..metrics import ReplicaMetrics
from . import flask_request
from .access_log import AccessRecord
from .chat import chat_completion, chat_events, chat_prompts
from .completions import completion, completion_events, completion_prompts
from .errors import ApiError
from .events import event_stream
from .generation import Generation
from .keep_alive import KeepAlive
from .logprob_limits import check_logprobs
from .protocol import ChatRequest, CompletionRequest
from .request_trace import RequestTrace
from .response_input import read_responses_request
from .response_object import response_events, response_object, response_prompts
from .responses import error_response, json_response
from .served_model import ServedModel
from .side_endpoints import add_side_endpoints
from .validation import decode_object

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_log = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"
RESPONSES_PATH = "/v1/responses"
COMPLETIONS_PATH = "/v1/completions"
#: Bytes of a resumption beside the client's body.
_MAX_DELIVERED = 4 << 20
_SLASHES = re.compile(r"//+")
#: Limit of a path in an error message, in characters.
_MAX_PATH_LENGTH = 200


def create_app(served: ServedModel) -> Flask:
    """Return the application with the routes of OpenAI's API, /health, /metrics and the resumption."""
    app = Flask("fastdeploy", static_folder=None)
    # Do not read FLASK_DEBUG.
    app.debug = False
    app.config["MAX_CONTENT_LENGTH"] = served.config.max_body_bytes
    # No redirects: their URLs have the replica's address, which clients of the router cannot reach.
    app.url_map.merge_slashes = False
    app.wsgi_app = _MergeSlashes(app.wsgi_app)  # type: ignore[method-assign]

    @app.before_request
    def begin() -> Response | None:
        g.record = AccessRecord(flask_request.request_id(), request.method, _path())
        if _is_logged(request.path):
            _begin_trace(served, g.record)
        #: Resources to release when the last byte of the response has been sent.
        g.resources = ExitStack()
        if flask_request.is_preflight():
            return _preflight(served.config.cors)
        if needs_key(request.path) and request.method != "OPTIONS":
            flask_request.authorize_client(served.config.api_keys)
        return None

    @app.after_request
    def finish(response: Response) -> Response:
        record: AccessRecord = g.record
        record.status = response.status_code
        response.headers["X-Request-Id"] = record.request_id
        if "Origin" in request.headers and is_for_pages(request.path) and not flask_request.is_preflight():
            response.headers.update(served.config.cors.headers(request.headers["Origin"]))
        # Not in a `finally` of the stream: a generator that was never started does not run it.
        response.call_on_close(g.resources.close)
        if _is_logged(request.path):
            response.call_on_close(record.log)
        if record.trace is not None:
            response.call_on_close(partial(record.trace.end, record))
        return response

    @app.post(CHAT_PATH)
    def chat_completions() -> Response:
        _admit(served)
        return _chat(served, flask_request.read_body())

    @app.post(COMPLETIONS_PATH)
    def completions() -> Response:
        _admit(served)
        return _completion(served, flask_request.read_body())

    @app.post(RESPONSES_PATH)
    def responses() -> Response:
        _admit(served)
        return _response(served, flask_request.read_body())

    @app.post(RESUME_PATH)
    def resume() -> Response:
        flask_request.authorize_router(served.identity.token)
        _admit(served)
        # Another replica has accepted the client's body; the tokens make it larger.
        request.max_content_length = served.config.max_body_bytes + _MAX_DELIVERED
        resumption = decode_resumption(flask_request.read_body("application/msgpack"))
        if resumption.path not in _RESUMABLE:
            raise ApiError(409, f"responses of {quote(resumption.path[:100])} cannot be resumed")
        return _RESUMABLE[resumption.path](served, resumption.body, resumption)

    @app.get("/v1/models")
    def models() -> Response:
        return json_response({"object": "list", "data": [_model_card(served)]})

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        served.require_model(name)
        return json_response(_model_card(served))

    @app.get("/health")
    @app.route("/ping", methods=["GET", "POST"])
    def health() -> Response:
        status, body = served.health()
        return json_response(body, status)

    add_side_endpoints(app, served)

    if served.config.metrics_port is None:

        @app.get("/metrics")
        def metrics() -> Response:
            return Response(served.metrics.render(), content_type=ReplicaMetrics.content_type)

    @app.errorhandler(FastDeployError)
    def known_error(error: FastDeployError) -> Response:
        g.record.error = str(error)
        return error_response(ApiError.of(error))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        message, code = f"{request.method} {_raw_path()}: {error.name}", None
        if error.code == 404:
            code = "unknown_url"
            if reason := reason_of(request.path):
                message = f"{request.method} {_raw_path()} is not served: {reason}"
        response = error_response(ApiError(error.code or 500, message, code=code))
        if "Allow" in (headers := dict(error.get_headers())):
            response.headers["Allow"] = headers["Allow"]
        return response

    @app.errorhandler(Exception)
    def unknown_error(error: Exception) -> Response:
        _log.exception("request=%s: unexpected exception", g.record.ids, exc_info=error)
        return error_response(ApiError(500, "internal error; the server's log has the details"))

    return app


class _MergeSlashes:
    """WSGI middleware that merges repeated slashes in a path, as the router does."""

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["PATH_INFO"] = _SLASHES.sub("/", environ["PATH_INFO"])
        return self._application(environ, start_response)


def _is_logged(path: str) -> bool:
    """Return True for a path whose requests appear in the access log, and in traces."""
    return path.startswith(("/v1", RESUME_PATH))


def _begin_trace(served: ServedModel, record: AccessRecord) -> None:
    record.trace_context = flask_request.trace_context()
    if served.tracing is None:
        return
    route = "" if request.url_rule is None else request.url_rule.rule
    trace = RequestTrace(served.tracing, record, route, record.trace_context, flask_request.trace_state())
    record.trace_context = context_of(trace.span)
    if trace.span.is_recording():
        record.trace = trace


def _admit(served: ServedModel) -> None:
    """Hold a place until the last byte of the response has been sent. See `ServedModel.admitted`."""
    g.resources.enter_context(served.admitted())
    record: AccessRecord = g.record
    if record.trace is not None:
        # While it holds the place: a process that ends waits for this.
        g.resources.callback(record.trace.end, record)


def _tokenizing() -> AbstractContextManager[None]:
    trace: RequestTrace | None = g.record.trace
    return nullcontext() if trace is None else trace.tokenizing()


def _chat(served: ServedModel, data: bytes, resumption: Resumption | None = None) -> Response:
    body = ChatRequest.parse(decode_object(data), served.defaults)
    served.require_model(body.model)
    created, keep_alive = _created(resumption), flask_request.keep_alive(served.engine)
    with _tokenizing():
        prompts = chat_prompts(served, body, created, keep_alive)
    generation = _generate(served, body, prompts, created, keep_alive, resumption)
    return (
        event_stream(chat_events(generation), g.record)
        if body.stream
        else json_response(chat_completion(generation))
    )


def _completion(served: ServedModel, data: bytes, resumption: Resumption | None = None) -> Response:
    body = CompletionRequest.parse(decode_object(data), served.defaults)
    served.require_model(body.model)
    created, keep_alive = _created(resumption), flask_request.keep_alive(served.engine)
    with _tokenizing():
        prompts = completion_prompts(served, body)
    generation = _generate(served, body, prompts, created, keep_alive, resumption)
    if body.stream:
        return event_stream(completion_events(generation, body), g.record)
    return json_response(completion(generation, body))


def _response(served: ServedModel, data: bytes, resumption: Resumption | None = None) -> Response:
    call = read_responses_request(decode_object(data), served.defaults)
    body, chat = call.body, call.chat
    served.require_model(chat.model)
    created, keep_alive = _created(resumption), flask_request.keep_alive(served.engine)
    if resumption is not None and chat.logprobs is not None:
        # The last events have the log probabilities of the whole text, so all of it is drawn again.
        resumption = msgspec.structs.replace(resumption, choices={})
    try:
        with _tokenizing():
            prompts = response_prompts(served, body, chat, created, keep_alive)
        generation = _generate(served, chat, prompts, created, keep_alive, resumption)
    except RequestError as error:
        raise call.renamed(error) from None
    if chat.stream:
        return event_stream(response_events(generation, body), g.record, typed=True)
    return json_response(response_object(generation, body))


#: Path -> handler of the requests that can be resumed.
_RESUMABLE = {CHAT_PATH: _chat, COMPLETIONS_PATH: _completion, RESPONSES_PATH: _response}


def _created(resumption: Resumption | None) -> int:
    return int(time.time()) if resumption is None else resumption.created


def _generate(
    served: ServedModel,
    body: ChatRequest | CompletionRequest,
    prompts: list[list[int]],
    created: int,
    keep_alive: KeepAlive | None,
    resumption: Resumption | None,
) -> Generation:
    if body.request_id is not None:
        if not flask_request.REQUEST_ID.fullmatch(body.request_id):
            raise RequestError(
                "request_id may contain only letters, digits and . : @ / + = - _ (1 to 128)", "request_id"
            )
        g.record.request_id = body.request_id
    seed = body.seed if body.seed is not None else flask_request.header_seed()
    # Another replica must draw the same tokens, and it does not know log probabilities that were not sent.
    is_resumable = seed is not None and (body.stream or not body.requested_logprobs)
    if resumption is not None and not is_resumable:
        what = "a seed" if seed is None else "its log probabilities so far"
        raise ApiError(409, f"a response cannot be resumed without {what}")
    check_logprobs(served, body, prompts)
    generation = Generation(
        served,
        body,
        prompts,
        record=g.record,
        seed=(served.seeds.draw() if seed is None else seed) & flask_request.MAX_SEED,
        created=created,
        client=flask_request.client_socket(),
        marked=is_resumable and flask_request.wants_marks(),
        keep_alive=keep_alive,
        resumption=resumption,
    )
    return g.resources.enter_context(generation)


def _preflight(policy: CorsPolicy) -> Response:
    """Return the response to a preflight, which needs no key because browsers send none."""
    origin, wanted = request.headers["Origin"], request.headers.get("Access-Control-Request-Headers", "")
    if policy.allows(origin):
        response = Response(status=204)
    else:
        response = error_response(ApiError(403, refusal_of(origin), code="origin_not_allowed"))
    response.headers.update(policy.preflight_headers(origin, wanted))
    return response


def _path() -> str:
    """Return the quoted path: Flask's decoded one may contain line breaks."""
    return quote(request.path)


def _raw_path() -> str:
    """Return the path as the client sent it, before slashes were merged."""
    sent: str = request.environ.get("RAW_URI", _path())
    return quote(sent.partition("?")[0][:_MAX_PATH_LENGTH], safe="/%:@!$&'()*+,;=~")


def _model_card(served: ServedModel) -> dict[str, Any]:
    name = served.config.served_model_name
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "FastDeploy",
        "root": str(served.config.engine.model),
        "parent": None,
        "max_model_len": served.config.engine.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": served.created,
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
