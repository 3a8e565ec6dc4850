"""Probes of programs: GET /health, and the generation of one token.

Each probe runs in a thread of its own, so that a hung replica blocks neither the loop nor other probes. The
results, called readings, come back through a queue. Health checks continue while a token probe waits.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.api_keys import keys_in, keys_in_variable
from ...common.errors import FastDeployError
from ...common.foreign_text import printable
from ...common.http_client import ConnectionRefused, NotJson, request
from ...common.trace_context import TRACEPARENT, TraceContext
from ..config.programs import Program, flag_in

log = logging.getLogger("fd-dp")

#: Seconds. A busy replica on a busy machine answers slowly.
_HEALTH_TIMEOUT = 10.0
#: Seconds. In an adopted replica the probe may have to wait for the prompts of other requests.
_TOKEN_TIMEOUT = 120.0
#: Request id; marks probes in the log of the replica.
_PROBE_ID = "fd-dp-probe"
#: A context that is not sampled: a probe is no trace, even where all requests are traced.
_NOT_TRACED = TraceContext("fd" * 16, "fd" * 8, flags=0).header
_KEYS_FILE = "--api-keys-file"
_TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True)
class Reading:
    """Result of one probe."""

    name: str
    #: Pid of the probed process; a reading of a previous process is ignored.
    pid: int
    #: GET /health returned 200, or a token was generated.
    ok: bool
    #: A token probe, not a health check.
    token: bool = False
    #: False if the connection was refused, as while the program starts; True after any other result.
    answered: bool = False
    #: JSON body of /health.
    health: dict[str, Any] = field(default_factory=dict)
    #: Error in one line.
    problem: str = ""


class Probes:
    """Runs probes and keeps their readings until the loop takes them."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._readings: queue.SimpleQueue[Reading] = queue.SimpleQueue()
        self._asked: dict[tuple[str, bool], int] = {}

    def ask(self, program: Program, pid: int, token: bool) -> None:
        """Begin a probe, unless one of the same kind and process is in progress."""
        if self._asked.get((program.name, token)) == pid:
            return
        # A daemon thread: a probe of a hung replica must not delay the exit.
        threading.Thread(target=self._probe, args=(program, pid, token), daemon=True).start()
        # Last, so that a failed start of a thread is retried.
        self._asked[program.name, token] = pid

    def take(self) -> list[Reading]:
        """Return the new readings."""
        readings = []
        while not self._readings.empty():
            reading = self._readings.get()
            if self._asked.get((reading.name, reading.token)) == reading.pid:
                del self._asked[reading.name, reading.token]
            readings.append(reading)
        return readings

    def _probe(self, program: Program, pid: int, token: bool) -> None:
        try:
            reading = (token_probe if token else health_probe)(program, pid)
        except Exception as fault:
            # Without a reading the program would never be probed again.
            log.exception("%s: internal error in a probe", program.label)
            reading = Reading(
                program.name, pid, False, token=token, problem=f"cannot be probed ({printable(repr(fault))})"
            )
        self._readings.put(reading)
        self._wake()


def health_probe(program: Program, pid: int) -> Reading:
    """Run one health check. Blocks for up to 10 s."""
    try:
        status, health = _request(program, "GET", "/health", None, _HEALTH_TIMEOUT)
        if status != 200:
            problem = (
                health.get("message")
                or health.get("stage")
                or health.get("status")
                or f"/health answered {status}"
            )
            return Reading(
                program.name, pid, False, answered=True, health=health, problem=printable(problem, 300)
            )
        return Reading(program.name, pid, True, answered=True, health=health)
    except FastDeployError as error:
        refused = isinstance(error, ConnectionRefused)
        return Reading(program.name, pid, False, answered=not refused, problem=_no_answer(program, error))


def token_probe(program: Program, pid: int) -> Reading:
    """Generate one token. Blocks for up to 120 s."""
    body = {"prompt": "Hello", "max_tokens": 1, **({"model": program.model} if program.model else {})}
    try:
        status, response = _request(program, "POST", "/v1/completions", body, _TOKEN_TIMEOUT)
    except FastDeployError as failure:
        return Reading(program.name, pid, False, token=True, problem=_no_answer(program, failure))
    # 429: the replica is full, so it works.
    if (status == 200 and response.get("choices")) or status == _TOO_MANY_REQUESTS:
        return Reading(program.name, pid, True, token=True, answered=True)
    error = response.get("error")
    detail = error.get("message") if isinstance(error, dict) else None
    problem = f"token probe failed: {printable(detail or f'/v1/completions answered {status}', 300)}"
    return Reading(program.name, pid, False, token=True, answered=True, problem=problem)


def _no_answer(program: Program, error: Exception) -> str:
    return f"no answer on port {program.ports[0]} ({printable(error)})"


def _request(
    program: Program, method: str, path: str, fields: dict[str, Any] | None, timeout: float
) -> tuple[int, dict[str, Any]]:
    """Return status and JSON object of the response. Raises HttpError, or ConfigError for an invalid key."""
    response = request(
        (program.host, program.ports[0]),
        method,
        path,
        timeout=timeout,
        fields=fields,
        headers={"X-Request-Id": _PROBE_ID, TRACEPARENT: _NOT_TRACED} if fields is not None else None,
        key=_api_key(program),
    )
    try:
        answer = response.json()
    except NotJson:
        answer = {}
    return response.status, answer if isinstance(answer, dict) else {}


def _api_key(program: Program) -> str:
    """Return a valid API key, or "" if none is needed. Raises ConfigError if the key cannot be read."""
    if file := flag_in(program.argv, _KEYS_FILE):
        return keys_in(_KEYS_FILE, Path(file))[0]
    return next(iter(keys_in_variable("FD_API_KEY", {**os.environ, **program.env})), "")
