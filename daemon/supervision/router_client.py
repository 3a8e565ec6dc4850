"""Client of the router's admin socket: registered replicas, flags, drain and undrain, exits of replicas.

Calls block, for seconds if the router hangs. So the loop makes them through `BackgroundCall`.
"""

from __future__ import annotations

import logging
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...common.errors import FastDeployError
from ...common.foreign_text import printable
from ...common.http_client import HttpError, request
from ..router.addresses import AllowedAddresses

log = logging.getLogger("fd-dp")

#: Seconds. The router answers in milliseconds, but the machine may be swapping.
_TIMEOUT = 2.0
_OK, _NOT_FOUND = 200, 404

T = TypeVar("T")


class RouterUnavailable(FastDeployError):
    """The router gave no usable response: it is down, starts, hangs, or is another program."""


@dataclass(frozen=True, slots=True)
class RegisteredReplica:
    """The router's entry of a replica of this machine."""

    #: HOST:PORT, the replica's name in admin requests.
    authority: str
    host: str
    port: int
    #: Passes the router's health checks.
    up: bool
    #: Has deregistered.
    leaving: bool
    #: Gets no new requests.
    draining: bool
    #: Requests in flight, including those of other routers.
    in_flight: int
    #: Id of this start of the replica; "" if it registered without one.
    instance: str = ""

    @property
    def in_service(self) -> bool:
        """True if it gets requests unless it is drained."""
        return self.up and not self.leaving


@dataclass(frozen=True, slots=True)
class ReplicaExit:
    """Exit of one start of a replica."""

    url: str
    instance: str
    #: The cause lies outside the replica, for example a kill by the operator.
    from_outside: bool


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags that the router runs with, and the state of its last reload."""

    #: Hash of the flags file as read by the worker that answered.
    hash: str
    #: Number of reloads since the router's start.
    number: int
    #: Outcome of the last reload: "done", "under way", "refused" or "failed".
    outcome: str


def registered(admin: Path) -> dict[int, RegisteredReplica]:
    """Return the registered replicas of this machine by port. Raises RouterUnavailable.

    Routers that share a board list replicas of other machines as well.
    """
    response = _call(admin, "GET", "/registered")
    try:
        rows = [_row(entry, up) for up in (True, False) for entry in response["mixed" if up else "down"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed("/registered", error) from None
    own = AllowedAddresses()
    return {row.port: row for row in rows if own.is_own(row.host)}


def set_draining(admin: Path, row: RegisteredReplica, draining: bool) -> None:
    """Drain or undrain a replica. No error if it is not registered any more. Raises RouterUnavailable."""
    name = urllib.parse.quote(row.authority, safe=":")
    _call(admin, "POST", f"/admin/replicas/{name}/{'drain' if draining else 'undrain'}", also=_NOT_FOUND)


def report_exit(admin: Path, ended: ReplicaExit) -> None:
    """Report how a replica ended, so that the router blames no request for an exit caused from outside.

    Raises RouterUnavailable.
    """
    report = {"url": ended.url, "instance": ended.instance, "from_outside": ended.from_outside}
    # 404: an older router still runs after an upgrade.
    _call(admin, "POST", "/admin/endings", also=_NOT_FOUND, fields=report)


def flags(admin: Path) -> Flags:
    """Return the flags of the running router. Raises RouterUnavailable."""
    response = _call(admin, "GET", "/health")
    try:
        reload = response["reload"]
        return Flags(str(response["flags"]), _of(int, reload["number"]), _of(str, reload["outcome"]))
    except (KeyError, TypeError) as error:
        raise _malformed("/health", error) from None


class BackgroundCall(Generic[T]):
    """A call in a thread of its own. The daemon does not wait for it when it ends."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: T | None = None
        self._problem: RouterUnavailable | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    def result(self) -> T:
        """Return the result of a call that is done. Raises RouterUnavailable."""
        if self._problem is not None:
            raise self._problem
        assert self._result is not None
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._call()
        except RouterUnavailable as problem:
            self._problem = problem
        except Exception as fault:
            # Without a result the caller would wait forever.
            log.exception("internal error in a call to the router")
            self._problem = RouterUnavailable(f"the router could not be called ({fault!r})")
        self._ended.set()


def _row(entry: dict[str, Any], up: bool) -> RegisteredReplica:
    url = urllib.parse.urlsplit(entry["url"])
    return RegisteredReplica(
        authority=url.netloc,
        host=url.hostname or "",
        port=url.port or 0,
        up=up,
        leaving=_of(bool, entry["leaving"]),
        draining=_of(bool, entry["draining"]),
        in_flight=_of(int, entry["in_flight"]) + _of(int, entry["in_flight_elsewhere"]),
        instance=str(entry.get("instance") or ""),
    )


def _malformed(path: str, error: Exception) -> RouterUnavailable:
    return RouterUnavailable(f"malformed response of the router to {path} ({printable(repr(error))})")


def _of(kind: type[T], value: Any) -> T:
    """Return `value` if it has exactly this type. Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, not {value!r}")
    return value


def _call(
    admin: Path, method: str, path: str, also: int = _OK, fields: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Send a request and return the JSON response. The status must be 200 or `also`."""
    try:
        response = request(admin, method, path, timeout=_TIMEOUT, fields=fields)
        if response.status not in (_OK, also):
            raise RouterUnavailable(f"the router answered {method} {path} with {response.status}")
        content = response.json()
        if not isinstance(content, dict):
            raise HttpError("response is not a JSON object")
        return content
    except HttpError as error:
        raise RouterUnavailable(f"the router does not answer on {admin} ({error})") from None
