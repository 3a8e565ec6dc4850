"""Errors in OpenAI's format: an HTTP status, and a body with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...common.errors import EngineLost, FastDeployError, ReplicaUnavailable, RequestError
from ...common.resumption import LOST_HEADER
from .engine_client import ClientGone
from .validation import WRONG_VALUE

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
#: Seconds in the Retry-After header of a refused request.
RETRY_AFTER = 1


class ApiError(FastDeployError):
    """An error response and its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self._headers = headers

    @classmethod
    def of(cls, error: FastDeployError) -> ApiError:
        """Return the response for any error of this package."""
        match error:
            case ApiError():
                return error
            case RequestError():
                code = error.code or (error.param and WRONG_VALUE)
                return cls(400, str(error), param=error.param, code=code)
            case ReplicaUnavailable():
                lost = {LOST_HEADER: "1"} if isinstance(error, EngineLost) else {}
                return cls(503, str(error), headers=lost)
            case ClientGone():
                # nginx's code for a closed connection; appears in the log only.
                return cls(499, str(error))
            case _:
                return cls(500, str(error))

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        match self.status:
            case 401:
                return {"WWW-Authenticate": "Bearer", **self._headers}
            case 429 | 503:
                return {"Retry-After": str(RETRY_AFTER), **self._headers}
            case _:
                return dict(self._headers)
