"""Keeps an exception in one request from reaching those who serve others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Crashing(Protocol):
    def crash(self) -> None:
        """Ends with an error; called in the `except` clause."""


S = TypeVar("S", bound=Crashing)
P = ParamSpec("P")
R = TypeVar("R")


def entry(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R | None]:
    """Marks a method that others call: an exception in it ends this request and reaches no caller.

    The callers serve many requests: the clock, the wait queue, the event loop's protocols and tasks.
    """

    @functools.wraps(method)
    def guarded(self: S, *arguments: P.args, **named: P.kwargs) -> R | None:
        try:
            return method(self, *arguments, **named)
        except Exception:
            self.crash()
            return None

    return guarded
