"""How a program is: GET /health, and what only a real token can tell.

Each probe is a thread of its own, so that neither the loop nor another probe waits for a replica that hangs;
its reading comes back through a queue. While a token is awaited, health checks go on.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.api_keys import keys_in, keys_in_variable
from ...common.errors import ConfigError
from ...common.foreign_text import parse_json, printable
from ..config.programs import Program, flag_in

log = logging.getLogger("fd-dp")

#: A busy replica on a busy machine may be slow to answer; slow is not dead.
_HEALTH_TIMEOUT = 10.0
#: The first token may have to wait for others' prompts when a running replica is adopted.
_TOKEN_TIMEOUT = 120.0
#: By which the log of a replica tells them from what clients ask.
_PROBE_ID = "fd-dp-probe"
_KEYS_FILE = "--api-keys-file"
_TOO_MANY_REQUESTS = 429
_MAX_BODY = 1 << 20
_NO_ANSWER = (OSError, ValueError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one probe found."""

    name: str
    #: Of the process that was asked: a reading of its predecessor says nothing.
    pid: int
    #: GET /health was 200, or the token came.
    ok: bool
    #: A token was asked for, and nothing about its health.
    token: bool = False
    #: It answered at all. A port that refuses is a program that is still starting.
    answered: bool = False
    #: The JSON body of /health.
    health: dict[str, Any] = field(default_factory=dict)
    #: What was wrong, in one line.
    problem: str = ""


class Probes:
    """Starts probes and keeps their readings until the loop takes them."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._readings: queue.SimpleQueue[Reading] = queue.SimpleQueue()
        self._asked: dict[tuple[str, bool], int] = {}

    def ask(self, program: Program, pid: int, token: bool) -> None:
        """Starts a probe of this program, unless one of this kind and of this process is still under way."""
        if self._asked.get((program.name, token)) == pid:
            return
        # Not joined at exit: a probe of a replica that hangs ends with the daemon.
        threading.Thread(target=self._probe, args=(program, pid, token), daemon=True).start()
        # Last, so that a thread that cannot be started is tried again.
        self._asked[program.name, token] = pid

    def take(self) -> list[Reading]:
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
            # Without a reading this program would never be asked again.
            log.exception("%s: a probe failed", program.label)
            reading = Reading(
                program.name, pid, False, token=token, problem=f"cannot be probed ({printable(repr(fault))})"
            )
        self._readings.put(reading)
        self._wake()


def health_probe(program: Program, pid: int) -> Reading:
    """One health check. Blocks for seconds at most."""
    try:
        status, health = _ask(program, "GET", "/health", None, _HEALTH_TIMEOUT)
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
    except _NO_ANSWER as error:
        refused = isinstance(error, ConnectionRefusedError)
        return Reading(program.name, pid, False, answered=not refused, problem=_silence(program, error))


def token_probe(program: Program, pid: int) -> Reading:
    """One generated token. Blocks for minutes if it does not come."""
    body = {"prompt": "Hello", "max_tokens": 1, **({"model": program.model} if program.model else {})}
    try:
        status, answer = _ask(program, "POST", "/v1/completions", body, _TOKEN_TIMEOUT)
    except _NO_ANSWER as error:
        return Reading(program.name, pid, False, token=True, problem=_silence(program, error))
    # It has so much to do that there is no room for one more.
    if (status == 200 and answer.get("choices")) or status == _TOO_MANY_REQUESTS:
        return Reading(program.name, pid, True, token=True, answered=True)
    said = answer.get("error")
    detail = said.get("message") if isinstance(said, dict) else None
    problem = f"a token failed: {printable(detail or f'/v1/completions answered {status}', 300)}"
    return Reading(program.name, pid, False, token=True, answered=True, problem=problem)


def _silence(program: Program, error: Exception) -> str:
    return f"no answer on port {program.ports[0]} ({printable(error)})"


def _ask(program: Program, method: str, path: str, body: Any, timeout: float) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(program.host, program.ports[0], timeout=timeout)
    try:
        headers = {"Content-Type": "application/json", "X-Request-Id": _PROBE_ID} if body is not None else {}
        if key := _key(program):
            headers["Authorization"] = f"Bearer {key}"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        try:
            answer = parse_json(response.read(_MAX_BODY))
        except ValueError:
            answer = {}
        return response.status, answer if isinstance(answer, dict) else {}
    finally:
        connection.close()


def _key(program: Program) -> str:
    """One that a replica takes; empty if it asks for none. Raises ValueError if it cannot be read."""
    try:
        if file := flag_in(program.argv, _KEYS_FILE):
            return keys_in(_KEYS_FILE, Path(file))[0]
        return next(iter(keys_in_variable("FD_API_KEY", {**os.environ, **program.env})), "")
    except ConfigError as error:
        raise ValueError(str(error)) from None
