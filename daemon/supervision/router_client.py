"""Talks to the router over its admin socket: who is registered, what it runs with, and orders to drain.

Everything in here blocks, for seconds if the router hangs: the loop calls it through `InBackground`.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...common.errors import FastDeployError
from ...common.foreign_text import parse_json, printable
from ..router.addresses import AllowedAddresses

log = logging.getLogger("fd-dp")

#: It answers in milliseconds; this is for a machine that swaps.
_TIMEOUT = 2.0
_MAX_BODY = 1 << 20
_OK, _NOT_FOUND = 200, 404

T = TypeVar("T")


class RouterSilent(FastDeployError):
    """The router gives no answer that can be used: it is down, starts, hangs, or is another program."""


@dataclass(frozen=True, slots=True)
class Row:
    """A replica of this machine, as the router knows it."""

    #: HOST:PORT, which is its name in orders.
    authority: str
    host: str
    port: int
    #: It works, as far as the router knows; it has said farewell; nothing new is given to it.
    up: bool
    leaving: bool
    draining: bool
    #: Requests that it has, those that other routers have given it included.
    in_flight: int
    #: Id of this start of the replica; empty if it gives none.
    instance: str = ""

    @property
    def is_there(self) -> bool:
        """It gets requests, unless it is drained."""
        return self.up and not self.leaving


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one start of a replica."""

    url: str
    instance: str
    #: The reason was not the replica itself.
    from_outside: bool


@dataclass(frozen=True, slots=True)
class Flags:
    """What the router runs with."""

    #: Of the flags file, as the answering worker has read it.
    hash: str
    #: Of the last SIGHUP since its start, and what became of it: "done", "under way", "refused", "failed".
    number: int
    outcome: str


def registered(admin: Path) -> dict[int, Row]:
    """Replicas of this machine by their port; those of others, which share this router's board, are left out.

    Raises RouterSilent.
    """
    answer = _ask(admin, "GET", "/registered")
    try:
        rows = [_row(entry, up) for up in (True, False) for entry in answer["mixed" if up else "down"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RouterSilent(f"the router's /registered is not understood ({printable(repr(error))})") from None
    own = AllowedAddresses()
    return {row.port: row for row in rows if own.is_own(row.host)}


def set_draining(admin: Path, row: Row, draining: bool) -> None:
    """Nothing happens if the router does not know it any more. Raises RouterSilent."""
    name = urllib.parse.quote(row.authority, safe=":")
    _ask(admin, "POST", f"/admin/replicas/{name}/{'drain' if draining else 'undrain'}", also=_NOT_FOUND)


def tell_of_end(admin: Path, ended: Ended) -> None:
    """Tell the router how a replica ended: no request is to blame for an end from outside.

    Raises RouterSilent.
    """
    word = {"url": ended.url, "instance": ended.instance, "from_outside": ended.from_outside}
    # 404: an older router that still runs after an upgrade.
    _ask(admin, "POST", "/admin/endings", also=_NOT_FOUND, body=json.dumps(word))


def flags(admin: Path) -> Flags:
    """Raises RouterSilent."""
    answer = _ask(admin, "GET", "/health")
    try:
        told = answer["reload"]
        return Flags(str(answer["flags"]), _of(int, told["number"]), _of(str, told["outcome"]))
    except (KeyError, TypeError) as error:
        raise RouterSilent(f"the router's /health is not understood ({printable(repr(error))})") from None


class InBackground(Generic[T]):
    """One call in a thread of its own, which ends by itself soon and is not joined at exit."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._answer: T | None = None
        self._problem: RouterSilent | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    def result(self) -> T:
        """When it is done. Raises RouterSilent."""
        if self._problem is not None:
            raise self._problem
        assert self._answer is not None
        return self._answer

    def _run(self) -> None:
        try:
            self._answer = self._call()
        except RouterSilent as problem:
            self._problem = problem
        except Exception as fault:
            # Whoever waits for the end of this call must not wait for ever.
            log.exception("a question to the router failed")
            self._problem = RouterSilent(f"it could not be asked ({fault!r})")
        self._ended.set()


class _Connection(http.client.HTTPConnection):
    def __init__(self, admin: Path) -> None:
        super().__init__("router", timeout=_TIMEOUT)
        self._admin = admin

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect(str(self._admin))


def _row(entry: dict[str, Any], up: bool) -> Row:
    url = urllib.parse.urlsplit(entry["url"])
    return Row(
        authority=url.netloc,
        host=url.hostname or "",
        port=url.port or 0,
        up=up,
        leaving=_of(bool, entry["leaving"]),
        draining=_of(bool, entry["draining"]),
        in_flight=_of(int, entry["in_flight"]) + _of(int, entry["in_flight_elsewhere"]),
        instance=str(entry.get("instance") or ""),
    )


def _of(kind: type[T], value: Any) -> T:
    """Return `value` if it has exactly this type. Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, not {value!r}")
    return value


def _ask(admin: Path, method: str, path: str, also: int = _OK, body: str | None = None) -> dict[str, Any]:
    """`also`: a status beside 200 that is no fault."""
    connection = _Connection(admin)
    try:
        connection.request(method, path, body, headers={"Connection": "close"})
        response = connection.getresponse()
        answer = parse_json(response.read(_MAX_BODY))
        if response.status not in (_OK, also):
            raise RouterSilent(f"the router answered {method} {path} with {response.status}")
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
        return answer
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RouterSilent(
            f"the router does not answer on {admin} ({printable(error) or type(error).__name__})"
        ) from None
    finally:
        connection.close()
