"""Injected faults for a router under test, whose `sitecustomize.py` calls `install`.

A request with the header `X-Fault: NAME` makes that method of its own exchange, attempt, delivery or client
connection raise on each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdeploy.daemon.router.http.client import ClientConnection
from fastdeploy.daemon.router.http.request import ClientRequest
from fastdeploy.daemon.router.relay.attempt import Attempt
from fastdeploy.daemon.router.relay.delivery import Delivery
from fastdeploy.daemon.router.relay.exchange import Exchange
from fastdeploy.daemon.router.relay.guarded import entry

#: Methods of an exchange that the clock, the wait queue and the client connection call.
EXCHANGE = ("start", "watch", "try_again", "give_up", "client_gone")
#: Methods of an attempt that the pool and the replica connection call.
ATTEMPT = ("connected", "unreachable", "informed", "began", "received", "ended", "failed")
ENTRIES = EXCHANGE + ATTEMPT
#: Methods of a delivery, called by its exchange and attempts, some of them while the request ends.
DELIVERY = ("expect", "receive", "finish", "respond", "break_off", "resumption")
CLIENT_WATCH = "client-watch"


def install() -> None:
    for name in EXCHANGE:
        inner = getattr(Exchange, name).__wrapped__
        setattr(Exchange, name, entry(_raising(name, inner, lambda exchange: exchange._request)))
    for name in ATTEMPT:
        inner = getattr(Attempt, name).__wrapped__
        setattr(Attempt, name, entry(_raising(name, inner, lambda attempt: attempt._delivery._request)))
    for name in DELIVERY:
        setattr(Delivery, name, _raising(name, getattr(Delivery, name), lambda delivery: delivery._request))
    ClientConnection.watch = _raising(  # type: ignore[method-assign]
        CLIENT_WATCH, ClientConnection.watch, lambda connection: getattr(connection._task, "_request", None)
    )


def _raising(
    name: str, method: Callable[..., Any], request_of: Callable[[Any], ClientRequest | None]
) -> Callable[..., Any]:
    def raising(self: Any, *arguments: Any, **named: Any) -> Any:
        request = request_of(self)
        if request is not None and any(
            key.lower() == b"x-fault" and value == name.encode() for key, value in request.headers
        ):
            raise RuntimeError(f"injected into {name}")
        return method(self, *arguments, **named)

    return raising
