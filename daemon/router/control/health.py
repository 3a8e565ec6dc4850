"""Health checks of the replicas, each in its own thread, so that a replica that hangs delays no other."""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import NamedTuple

from ....common.http_client import ConnectionRefused, HttpError, request
from ..board.board import Board
from ..instance import Instance, ReplicaHandle
from ..policy.policy import Policy
from ..replica_metrics import read_metrics
from .registry import RegistryFile

logger = logging.getLogger(__name__)

#: Seconds of a check. An instance gives up its registration, which waits for a check, after 5 s.
_TIMEOUT = 4.0
_MEASURE_SECONDS = 1.0
#: Limit from which a replica's number of running or waiting requests is invalid.
_MAX_REQUESTS = 1 << 31


class Problem(NamedTuple):
    """Reason why a replica is not healthy."""

    text: str
    #: It refused the connection.
    refused: bool = False

    def __str__(self) -> str:
        return self.text


def check(instance: Instance) -> Problem | None:
    """Return None if GET /health answers 200. Blocks for a few seconds at most."""
    try:
        answer = request((instance.host, instance.port), "GET", "/health", timeout=_TIMEOUT, limit=0)
    except HttpError as error:
        return Problem(f"{instance.authority}: {error}", refused=isinstance(error, ConnectionRefused))
    if answer.status != 200:
        return Problem(f"{instance.authority} answered /health with {answer.status}")
    return None


def read_load(instance: Instance) -> tuple[int, int] | None:
    """Return the running and the waiting requests by its own metrics; None if they are not there."""
    exposition = read_metrics(instance, _TIMEOUT)
    if exposition is None:
        return None
    running, waiting = (_value_of(name, exposition) for name in ("running", "waiting"))
    return None if running is None or waiting is None else (running, waiting)


class Monitor:
    """Two threads that check and measure the replicas while this process is the leader."""

    def __init__(self, board: Board, registry: RegistryFile, policy: Policy, interval: float) -> None:
        self._board = board
        self._registry = registry
        self._policy = policy
        self._interval = interval
        self._lock = threading.Lock()
        self._being_checked: set[ReplicaHandle] = set()

    def start(self) -> None:
        """Start the threads. Call this after the fork, which threads do not survive."""
        for target in (self._check_all, self._measure):
            threading.Thread(target=target, name="monitor", daemon=True).start()

    def _check_all(self) -> None:
        while True:
            try:
                self._check_each()
            except Exception:
                # Without this thread no replica would be checked again.
                logger.exception("a round of health checks failed; the next one follows")
            time.sleep(self._interval)

    def _check_each(self) -> None:
        if not self._board.try_lead():
            return
        for handle in self._board.handles():
            threading.Thread(target=self._check, args=(handle,), name="health", daemon=True).start()
        self._board.forget_lost()
        self._registry.keep(self._board)

    def _measure(self) -> None:
        while True:
            try:
                if self._board.try_lead():
                    self._board.measure(time.monotonic())
            except Exception:
                logger.exception("a measurement of the replicas failed; the next one follows")
            time.sleep(_MEASURE_SECONDS)

    def _check(self, handle: ReplicaHandle) -> None:
        with self._lock:
            if handle in self._being_checked:
                return  # the check before this one is still waiting
            self._being_checked.add(handle)
        try:
            asked_at = time.monotonic()
            problem = check(handle.instance)
            if problem is None:
                self._board.healthy(handle, asked_at)
                if self._policy.needs_load and (load := read_load(handle.instance)) is not None:
                    self._board.set_load(handle, *load)
            elif problem.refused:
                self._board.unreachable(handle, problem.text)
            else:
                self._board.failed(handle, problem.text)
        finally:
            with self._lock:
                self._being_checked.discard(handle)


def _value_of(name: str, exposition: bytes) -> int | None:
    """Return a metric's sum over all labels: an engine with several ranks has a line for each."""
    pattern = rb"^fastdeploy:num_requests_%s(?:\{[^}\n]*\})? ([0-9.eE+]+)" % name.encode()
    found = re.findall(pattern, exposition, re.MULTILINE)
    try:
        value = int(sum(map(float, found))) if found else None
    except (ValueError, OverflowError):
        return None
    return value if value is None or value < _MAX_REQUESTS else None
