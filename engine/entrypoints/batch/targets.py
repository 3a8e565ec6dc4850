"""Where the requests of a batch are answered: by a worker of this process, or by a running server."""

from __future__ import annotations

import threading
import time
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from ...common.api_client import ApiClient, ServerUnreachable
from ...common.errors import FastDeployError
from ..openai.seeds import Seeds
from .requests import Request, result_line

if TYPE_CHECKING:
    from ..llm.offline_engine import OfflineEngine

#: Statuses of a server that may answer the same request later.
_LATER = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
_FIRST_PAUSE, _MAX_PAUSE = 0.25, 8.0
#: Seconds for which a server may be away, such as for a restart.
_PATIENCE = 60.0


class Target(Protocol):
    def answer(self, number: int, request: Request) -> bytes:
        """Return the line of the output file for request `number`. For any thread.

        Raises:
            FastDeployError: this request and further ones cannot be answered now.
        """


class OfflineTarget:
    """A worker of this process.

    Args:
        seed: base of the seeds of requests without one, by their number; None: random seeds.
    """

    def __init__(self, engine: OfflineEngine, seed: int | None) -> None:
        self._engine = engine
        self._seeds = Seeds(seed)

    def answer(self, number: int, request: Request) -> bytes:
        request_id = uuid.uuid4().hex
        headers = {"X-Request-Id": request_id, "X-FD-Seed": str(self._seeds.at(number))}
        status, body = self._engine.post(request.path, request.body, headers)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self._engine.require_alive()
            raise FastDeployError("the worker is being stopped")
        return result_line(request, status, request_id, body)


class ServerTarget:
    """A running server."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self._local = threading.local()

    def answer(self, number: int, request: Request) -> bytes:
        pause, end = _FIRST_PAUSE, time.monotonic() + _PATIENCE
        client = self._client()
        while True:
            after = None
            try:
                response = client.request("POST", request.path.removeprefix("/v1"), request.body)
            except ServerUnreachable as error:
                why = str(error)
            else:
                if response.status == HTTPStatus.UNAUTHORIZED:
                    raise FastDeployError(f"{self._url} refuses the API key; set FD_API_KEY")
                if response.status not in _LATER:
                    return result_line(request, response.status, response.request_id, response.body)
                why, after = f"{self._url} answers {response.status}", response.retry_after
            if time.monotonic() > end:
                raise FastDeployError(f"no answer for {_PATIENCE:g} s: {why}")
            time.sleep(max(pause, after or 0.0))
            pause = min(2 * pause, _MAX_PAUSE)

    def _client(self) -> ApiClient:
        if not hasattr(self._local, "client"):
            self._local.client = ApiClient(self._url, self._key)
        client: ApiClient = self._local.client
        return client
