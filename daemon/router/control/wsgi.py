"""Runs a WSGI application in a thread and returns its response to the connection."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any

from ..http.protocols import Client
from ..http.request import ClientRequest
from ..http.responses import error, header_lines
from ..metrics.metrics import Metrics

logger = logging.getLogger(__name__)

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


class WsgiCall:
    """One request to the application. It is never cancelled, because the application answers quickly."""

    def __init__(
        self,
        application: Application,
        executor: Executor,
        metrics: Metrics,
        client: Client,
        request: ClientRequest,
    ) -> None:
        self._client: Client | None = client
        self._request = request
        self._metrics = metrics
        self._began_at = time.monotonic()
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(executor, _answer, application, environ_of(request))
        future.add_done_callback(self._done)

    def client_gone(self) -> None:
        self._client = None

    def pause(self) -> None:
        """Do nothing: the response is complete before it is sent."""

    def resume(self) -> None:
        """Do nothing, as in `pause`."""

    def _done(self, future: asyncio.Future[tuple[str, list[tuple[str, str]], bytes]]) -> None:
        try:
            status, headers, body = future.result()
        except Exception:
            logger.exception("the control plane failed")
            failure = error(500, "internal server error", "internal_error")
            status, headers, body = failure.status_line, list(failure.headers), failure.body
        lines = header_lines(
            header for header in headers if header[0].lower() not in ("content-length", "connection")
        )
        seconds = time.monotonic() - self._began_at
        self._metrics.answered(self._request.method, self._request.path, int(status[:3]), seconds)
        if self._client is not None:
            self._client.respond(status.encode("latin-1"), lines, body)


def environ_of(request: ClientRequest) -> Environ:
    """Return the environ of PEP 3333. REMOTE_ADDR is empty on the unix socket."""
    path, _, query = request.target.partition(b"?")
    environ: Environ = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": urllib.parse.unquote_to_bytes(path).decode("latin-1"),
        # Not in PEP 3333, but servers and Werkzeug use this name.
        "RAW_URI": request.sent_target.decode("latin-1"),
        "QUERY_STRING": query.decode("latin-1"),
        "SERVER_NAME": "fd-router",
        "SERVER_PORT": "0",
        "SERVER_PROTOCOL": "HTTP/1.0" if request.is_http_1_0 else "HTTP/1.1",
        "REMOTE_ADDR": request.peer,
        "CONTENT_LENGTH": str(len(request.body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in request.headers:
        key = name.decode("latin-1").upper()
        # A name with an underscore could pose as the header that has a hyphen there.
        if "_" in key or key == "CONTENT-LENGTH":
            continue
        key = "CONTENT_TYPE" if key == "CONTENT-TYPE" else "HTTP_" + key.replace("-", "_")
        text = value.decode("latin-1")
        environ[key] = f"{environ[key]},{text}" if key in environ else text
    return environ


def _answer(application: Application, environ: Environ) -> tuple[str, list[tuple[str, str]], bytes]:
    begun: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        begun[:] = [(status, headers)]

    chunks = application(environ, start_response)
    try:
        body = b"".join(chunks)
    finally:
        if hasattr(chunks, "close"):
            chunks.close()
    return *begun[0], body
