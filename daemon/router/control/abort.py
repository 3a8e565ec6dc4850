"""/v1/abort_requests: sent to all replicas, and answered with their joined result."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from ....common.api_paths import ABORT_PATH
from ....common.http_client import HttpError, request
from ..board.board import Status
from ..http.refusals import no_replica
from ..http.responses import Response

#: Seconds for the answer of each replica.
_TIMEOUT = 5.0
#: Replicas that are asked at the same time.
_THREADS = 16
_JSON = (("Content-Type", "application/json"),)


class _Result(msgspec.Struct):
    aborted: list[msgspec.Raw]
    not_found: list[str]


class _Answer(msgspec.Struct):
    """Answer of a replica. What is in its list of requests is passed on as it is."""

    result: _Result


class _Asked(NamedTuple):
    replica: Status
    status: int = 0
    body: bytes = b""
    #: Why there is no answer.
    problem: str = ""


def abort_everywhere(replicas: Sequence[Status], body: bytes, authorization: str, identity: str) -> Response:
    """Send the request to all replicas.

    Args:
        replicas: one that is down is asked too, because it may only be slow; it need not answer.
        body: the client's.
        identity: id of this request.

    Returns:
        The joined results; 502 if a replica that is up did not answer; or a replica's refusal.
    """
    if not replicas:
        return no_replica(())
    headers = {"Content-Type": "application/json", "X-Request-Id": identity}
    if authorization:
        headers["Authorization"] = authorization

    def ask(replica: Status) -> _Asked:
        server = replica.instance.host, replica.instance.port
        try:
            answer = request(server, "POST", ABORT_PATH, timeout=_TIMEOUT, body=body, headers=headers)
        except HttpError as error:
            return _Asked(replica, problem=str(error))
        return _Asked(replica, answer.status, answer.body)

    with ThreadPoolExecutor(min(len(replicas), _THREADS)) as pool:
        asked = list(pool.map(ask, replicas))
    # All replicas check the request alike.
    refusal = next((each for each in asked if 400 <= each.status < 500 and each.status != 404), None)
    return _joined(asked, identity) if refusal is None else Response(refusal.status, refusal.body, _JSON)


def _joined(asked: Sequence[_Asked], identity: str) -> Response:
    results: list[_Result] = []
    problems: list[str] = []
    for each in asked:
        problem = each.problem
        if not problem:
            try:
                results.append(msgspec.json.decode(each.body, type=_Answer).result)
                continue
            except msgspec.DecodeError:
                problem = f"answered {each.status}"
        if each.replica.up:
            problems.append(f"replica {each.replica.instance.name}: {problem}")
    # Each request is at one replica.
    unknown = set(results[0].not_found).intersection(*(each.not_found for each in results)) if results else ()
    joined = {
        "request_id": identity,
        "status": "error" if problems else "success",
        "error_message": "; ".join(problems) or None,
        "result": {
            "aborted": [request for each in results for request in each.aborted],
            "not_found": [each for each in (results[0].not_found if results else ()) if each in unknown],
        },
    }
    return Response(502 if problems else 200, msgspec.json.encode(joined), _JSON)
