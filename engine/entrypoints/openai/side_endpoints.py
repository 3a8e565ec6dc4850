"""Endpoints beside generation: tokens, load, version, configuration and the description of the API."""

from __future__ import annotations

from typing import Any

import msgspec
from flask import Flask, Response, g

from ... import __version__
from ...common.api_paths import (
    ABORT_PATH,
    CONFIG_PATH,
    DETOKENIZE_PATH,
    DOCS_PATH,
    OPENAPI_PATH,
    TOKENIZE_PATH,
)
from ...common.errors import RequestError
from . import flask_request
from .api_description import docs_page, openapi
from .bodies import AbortBody
from .options import ServeConfig
from .responses import json_response
from .served_model import ServedModel
from .tokenization import detokenize, tokenize
from .validation import MISSING, decode_object, validated

#: The page loads nothing, whatever is in it.
_DOCS_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def add_side_endpoints(app: Flask, served: ServedModel) -> None:
    """Add the routes to the application."""

    @app.post(TOKENIZE_PATH)
    @app.post(f"/v1{TOKENIZE_PATH}")
    def tokens() -> Response:
        g.resources.enter_context(served.admitted())
        values = decode_object(flask_request.read_body())
        return json_response(tokenize(served, values, flask_request.keep_alive(served.engine)))

    @app.post(DETOKENIZE_PATH)
    @app.post(f"/v1{DETOKENIZE_PATH}")
    def text() -> Response:
        g.resources.enter_context(served.admitted())
        return json_response(detokenize(served, decode_object(flask_request.read_body())))

    @app.post(ABORT_PATH)
    def abort() -> Response:
        body = validated(decode_object(flask_request.read_body()), AbortBody)
        if not body.abort_all and not body.req_ids:
            raise RequestError(
                "req_ids is missing; it must be a list of ids, or abort_all must be true",
                "req_ids",
                code=MISSING,
            )
        result = served.open_requests.abort(None if body.abort_all else body.req_ids)
        return json_response(
            {
                "request_id": g.record.request_id,
                "status": "success",
                "error_message": None,
                "result": msgspec.to_builtins(result),
            }
        )

    @app.get("/version")
    def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/load")
    def load() -> Response:
        return json_response(
            {"server_load": served.in_flight, "max_concurrency": served.config.max_concurrency}
        )

    @app.get(CONFIG_PATH)
    def configuration() -> Response:
        return json_response(config_info(served.config))

    @app.get(OPENAPI_PATH)
    def description() -> Response:
        return Response(openapi(), mimetype="application/json")

    @app.get(DOCS_PATH)
    def docs() -> Response:
        return Response(docs_page(), mimetype="text/html", headers=_DOCS_HEADERS)


def config_info(config: ServeConfig) -> dict[str, Any]:
    """Return the configuration without secrets."""
    shown: dict[str, Any] = {
        "version": __version__,
        "served_model_name": config.served_model_name,
        "host": config.host,
        "port": config.port,
        "metrics_port": config.metrics_port,
        "max_concurrency": config.max_concurrency,
        "tool_call_parser": config.tool_call_parser,
        "reasoning_parser": config.reasoning_parser,
        "timeout_graceful_shutdown": config.timeout_graceful_shutdown,
        "max_body_bytes": config.max_body_bytes,
        "cors_origins": sorted(config.cors.origins),
        "engine": msgspec.to_builtins(config.engine, enc_hook=str),
    }
    return shown
