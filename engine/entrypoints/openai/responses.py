"""JSON responses of the application."""

from __future__ import annotations

from typing import Any

import msgspec
from flask import Response

from .errors import ApiError


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, mimetype="application/json")


def error_response(error: ApiError) -> Response:
    response = json_response(error.body, error.status)
    response.headers.update(error.headers)
    return response
