"""Client of an OpenAI-compatible server for requests that may take any time, streams included.

`http_client.py` is for short requests: it limits their time and does not stream.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from .api_keys import keys_in_variable
from .errors import ConfigError, FastDeployError
from .foreign_text import parse_json, printable

DEFAULT_URL = "http://localhost:8000/v1"
#: Seconds to connect.
_CONNECT_SECONDS = 10.0
_MAX_BODY = 64 << 20
_MAX_EVENT = 8 << 20
_DATA, _END = b"data: ", b"data: [DONE]"


class ServerUnreachable(FastDeployError):
    """There is no complete response."""


class ServerRefused(FastDeployError):
    """The response has an error status; the message is the server's."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response with any status."""

    status: int
    body: bytes
    #: Empty if the server has none.
    request_id: str
    #: Seconds after which the server wants the request again, if it said so.
    retry_after: float | None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    """New output: `delta` of a chat, `text` of a completion."""

    delta: Delta = msgspec.field(default_factory=Delta)
    text: str = ""
    finish_reason: str | None = None


class Event(msgspec.Struct):
    """An event of a stream."""

    choices: list[Choice] = []
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ApiClient:
    """A connection that is kept between requests. For one thread.

    Args:
        url: of the API, such as http://localhost:8000/v1; without a path /v1 is meant.
        key: API key; empty: none.
        name: the server in errors.

    Raises:
        ConfigError: the URL is not valid.
    """

    def __init__(self, url: str, key: str = "", name: str = "server") -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"--url is {printable(url)!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise ConfigError(f"--url is {printable(url)!r}; it must be like {DEFAULT_URL}")
        self.url = url
        self._name = name
        #: The URL without its path.
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self._base = parts.path.rstrip("/") or "/v1"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._connection = (
            http.client.HTTPSConnection(
                host, port, timeout=_CONNECT_SECONDS, context=ssl.create_default_context()
            )
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=_CONNECT_SECONDS)
        )

    def first_model(self) -> tuple[str, Path | None]:
        """Return the first model of the server, and its directory if that is on this machine.

        Raises:
            ServerUnreachable, ServerRefused: the server does not say.
        """
        response = self.request("GET", "/models")
        if response.status != http.HTTPStatus.OK:
            raise self._refusal(response.status, response.body)
        try:
            card = parse_json(response.body)["data"][0]
            directory = Path(card.get("root") or "")
            return str(card["id"]), directory if directory.is_absolute() and directory.is_dir() else None
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            raise ServerUnreachable(f"{self.url}/models is not a list of models") from None

    def request(self, method: str, path: str, body: bytes | None = None) -> Response:
        """Return the response to a request.

        Args:
            path: after that of the API, such as /completions.

        Raises:
            ServerUnreachable: there is no complete response.
        """
        try:
            response = self._send(method, path, body)
            content = response.read(_MAX_BODY + 1)
            if len(content) > _MAX_BODY:
                self.close()
                raise ServerUnreachable(f"the response of {self.url} has more than {_MAX_BODY} bytes")
            request_id = response.getheader("X-Request-Id") or ""
            retry_after = _seconds(response.getheader("Retry-After"))
            return Response(response.status, content, request_id, retry_after)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from None

    def stream(self, path: str, fields: dict[str, Any]) -> Iterator[Event]:
        """Yield the events of a stream.

        Raises:
            ServerUnreachable: the stream cannot be read to its end.
            ServerRefused: the status is an error, or an event reports one.
        """
        is_complete = False
        try:
            response = self._send("POST", path, json.dumps(fields | {"stream": True}).encode())
            if response.status != http.HTTPStatus.OK:
                raise self._refusal(response.status, response.read(_MAX_EVENT))
            while line := response.readline(_MAX_EVENT):
                if line.strip() == _END:
                    is_complete = True
                elif line.startswith(_DATA):
                    yield read_event(line.removeprefix(_DATA))
            if not is_complete:
                raise ServerUnreachable(f"the stream of {self.url} has broken off")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from None
        finally:
            if not is_complete:
                self.close()

    def close(self) -> None:
        self._connection.close()

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """Send a request, again on a new connection if the server has closed the kept one."""
        is_new = self._connection.sock is None
        try:
            return self._send_once(method, path, body)
        except (ConnectionError, http.client.RemoteDisconnected):
            self.close()
            if is_new:
                raise
            return self._send_once(method, path, body)

    def _send_once(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        if self._connection.sock is None:
            self._connect()
        self._connection.request(method, self._base + path, body, self._headers)
        return self._connection.getresponse()

    def _connect(self) -> None:
        self._connection.connect()
        # A response may take any time, but a machine that has gone must be noticed.
        self._connection.sock.settimeout(None)
        self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        self.close()
        why = getattr(error, "strerror", None) or printable(error) or type(error).__name__
        return ServerUnreachable(f"the {self._name} at {self.url} does not answer ({why})")

    def _refusal(self, status: int, body: bytes) -> ServerRefused:
        hint = "; set FD_API_KEY" if status == http.HTTPStatus.UNAUTHORIZED else ""
        return ServerRefused(f"the {self._name} answered {status}: {_message(body)}{hint}")


def read_event(data: bytes) -> Event:
    """Return an event of a stream.

    Raises:
        ServerRefused: the event reports an error.
        ServerUnreachable: it is not an event.
    """
    try:
        event = msgspec.json.decode(data, type=Event)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ServerUnreachable(f"the stream has an event that is not valid ({printable(error)})") from None
    if event.error is not msgspec.UNSET:
        raise ServerRefused(f"generation failed: {_message(data)}")
    return event


def api_key() -> str:
    """Return the key of this user: the first in FD_API_KEY, else OPENAI_API_KEY, else an empty string."""
    keys = keys_in_variable("FD_API_KEY", os.environ) or keys_in_variable("OPENAI_API_KEY", os.environ)
    return keys[0] if keys else ""


def _message(body: bytes) -> str:
    try:
        return printable(parse_json(body)["error"]["message"], 300)
    except (ValueError, LookupError, TypeError):
        return printable(body.decode(errors="replace"), 300)


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isascii() and header.isdecimal() else None
