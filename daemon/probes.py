"""How a program is: GET /health, and for a replica that says it is ready, one real token.

Each probe is a thread of its own, so that neither the loop nor another probe waits for a replica that hangs;
its reading comes back through a queue.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .programs import Program

#: A busy replica on a busy machine may be slow to answer; slow is not dead.
_HEALTH_TIMEOUT = 10.0
#: The first token may have to wait for others' prompts when a running replica is adopted.
_TOKEN_TIMEOUT = 120.0
_MAX_BODY = 1 << 20


@dataclass(frozen=True, slots=True)
class Reading:
    """What one probe found."""

    name: str
    #: Of the process that was asked: a reading of its predecessor says nothing.
    pid: int
    #: GET /health was 200, and, where it was asked for, a token came.
    ok: bool
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
        self._asked: dict[str, int] = {}

    def ask(self, program: Program, pid: int, token: bool) -> None:
        """Starts a probe of this program, unless one of this process is still under way."""
        if self._asked.get(program.name) == pid:
            return
        self._asked[program.name] = pid
        # Not joined at exit: a probe of a replica that hangs ends with the daemon.
        threading.Thread(target=self._probe, args=(program, pid, token), daemon=True).start()

    def take(self) -> list[Reading]:
        readings = []
        while not self._readings.empty():
            reading = self._readings.get()
            if self._asked.get(reading.name) == reading.pid:
                del self._asked[reading.name]
            readings.append(reading)
        return readings

    def _probe(self, program: Program, pid: int, token: bool) -> None:
        reading = probe(program, pid, token)
        self._readings.put(reading)
        self._wake()


def probe(program: Program, pid: int, token: bool) -> Reading:
    """One health check; with `token`, also one generated token if a replica's health is good. Blocks.

    Of the router it also asks which replicas it knows: `health["in_flight"]` is their number -> requests.
    """
    try:
        status, health = _ask(program, "GET", "/health", None, _HEALTH_TIMEOUT)
        if status != 200:
            problem = (
                health.get("message")
                or health.get("stage")
                or health.get("status")
                or f"/health answered {status}"
            )
            return Reading(program.name, pid, False, True, health, str(problem))
        if program.replica is None:
            _, known = _ask(program, "GET", "/registered", None, _HEALTH_TIMEOUT)
            health["in_flight"] = {row.get("replica"): row.get("in_flight") for row in known.get("mixed", ())}
        elif token:
            body = {"prompt": "Hello", "max_tokens": 1, **({"model": program.model} if program.model else {})}
            status, answer = _ask(program, "POST", "/v1/completions", body, _TOKEN_TIMEOUT)
            if status != 200 or not answer.get("choices"):
                error = answer.get("error")
                detail = error.get("message") if isinstance(error, dict) else None
                problem = f"its first token failed: {detail or f'/v1/completions answered {status}'}"
                return Reading(program.name, pid, False, True, health, problem)
        return Reading(program.name, pid, True, True, health)
    except (OSError, ValueError, http.client.HTTPException) as error:
        refused = isinstance(error, ConnectionRefusedError)
        problem = f"no answer on port {program.ports[0]} ({error})"
        return Reading(program.name, pid, False, not refused, {}, problem)


def _ask(program: Program, method: str, path: str, body: Any, timeout: float) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(program.host, program.ports[0], timeout=timeout)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if keys := program.env.get("FD_API_KEY") or os.environ.get("FD_API_KEY"):
            headers["Authorization"] = f"Bearer {keys.partition(',')[0]}"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        try:
            answer = json.loads(response.read(_MAX_BODY))
        except ValueError:
            answer = {}
        return response.status, answer if isinstance(answer, dict) else {}
    finally:
        connection.close()
