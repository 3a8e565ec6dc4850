"""A client that leaves frees its place in the worker at once, not only at the end of the text.

The scripted worker's texts have no end: it serves no other request before it gets an abort.
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
def test_disconnect_aborts_the_request_in_the_worker_at_once(script: str, stream: bool) -> None:
    """This holds before the first token, in the middle of a stream, and for whole answers."""
    with served_by(script) as (served, port):
        leaving = ask(port, stream)
        if stream and script.startswith("says"):
            with leaving.getresponse() as answer:
                assert answer.readline().startswith(b"data: {")
        else:
            wait_until(
                lambda: b"requests_number_total 1.0" in served.metrics.render(), "the request is in flight"
            )
        leaving.close()
        assert served.wait_until_idle(30)
        # Without the abort, the worker would fail on this message of another kind.
        staying = ask(port, stream=False)
        assert staying.getresponse().status == 200
        staying.close()
