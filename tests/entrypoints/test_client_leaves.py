"""A client that leaves frees its place in the worker: at once, not when the text has come to its end.

The worker is a scripted one, whose texts have no end: it serves nobody else before it is told to abort.
"""

import http.client
import json

import pytest

from .conftest import wait_until
from .scripted_replica import served_by


def ask(port: int, stream: bool) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = {"prompt": "a", "max_tokens": 400, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize(
    ("script", "stream"),
    [
        ("is silent until told", True),
        ("is silent until told", False),
        ("says a word and is silent until told", True),
        ("says a word and is silent until told", False),
    ],
)
def test_the_worker_is_told_at_once(script, stream):
    """Before the first token, in the middle of a stream, and where an answer is sent only at its end."""
    with served_by(script) as (served, port):
        leaving = ask(port, stream)
        if stream and script.startswith("says"):
            with leaving.getresponse() as answer:
                assert answer.readline().startswith(b"data: {")
        else:
            wait_until(lambda: b"requests_number_total 1.0" in served.metrics.render(), "it is under way")
        leaving.close()
        assert served.wait_until_idle(30)
        # A worker that had not been told would take this for a message of another kind, and die of it.
        staying = ask(port, stream=False)
        assert staying.getresponse().status == 200
        staying.close()
