"""Malformed requests get a 400 that names the field, in words of JSON."""

from __future__ import annotations

import http.client
import json
import re

from .conftest import System
from .malformed import Malformed, malformed

NUMBER, SEED = 1000, 15
PYTHONS_WORDS = re.compile(
    r"\b(int|str|float|bool|dict|tuple|None|NoneType|True|False|msgspec|Struct)\b|Traceback|<class|object at"
)


def test_malformed_requests_are_refused_with_the_name_of_the_field(system: System) -> None:
    """Every other one goes through the router."""
    ports = (system.router.port, system.replicas[0].port)
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for port in ports]
    faults = []
    for number, request in enumerate(malformed(NUMBER, SEED)):
        fault = fault_of(connections[number % 2], request)
        if fault is not None:
            faults.append(f"{request.path} {request.field} {request.body[:150]!r}: {fault}")
    assert not faults, f"{len(faults)} of {NUMBER}:\n" + "\n".join(faults[:20])
    for connection in connections:
        connection.close()


def fault_of(connection: http.client.HTTPConnection, request: Malformed) -> str | None:
    """Send the request; return what is wrong about the response."""
    connection.request("POST", request.path, request.body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 400:
        return f"status {response.status}, {text[:200]}"
    error = json.loads(text)["error"]
    message, param = error["message"], error["param"]
    if error["type"] != "invalid_request_error" or len(message) > 300 or "\n" in message:
        return text
    if found := PYTHONS_WORDS.search(message):
        return f"{found[0]!r} in {text}"
    if request.field is None:
        return None if param is None and message.startswith("the body ") else text
    is_named = re.fullmatch(re.escape(request.field) + r"([.\[].*)?", param or "")
    is_told = param in message.replace("the chat template", "chat_template")
    return None if is_named and is_told and error["code"] else text
