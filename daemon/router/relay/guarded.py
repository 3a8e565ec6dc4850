"""A guard around the methods of a request: its exceptions do not reach code that serves other requests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Crashing(Protocol):
    def crash(self) -> None:
        """End with an error. Called in the `except` clause."""


S = TypeVar("S", bound=Crashing)
P = ParamSpec("P")
R = TypeVar("R")


def entry(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R | None]:
    """Decorate a method that other objects call: an exception in it ends this request and reaches no caller.

    The callers serve many requests: the clock, the wait queue, protocols and tasks of the event loop.
    """

    @functools.wraps(method)
    def guarded(self: S, *arguments: P.args, **named: P.kwargs) -> R | None:
        try:
            return method(self, *arguments, **named)
        except Exception:
            self.crash()
            return None

    return guarded
