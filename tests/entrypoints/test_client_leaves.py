"""A client that leaves frees its place in the worker: at once, not when the text has come to its end.

The worker is a scripted one, whose texts have no end: it serves nobody else before it is told to abort.
"""

import http.client
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_server

from fastdeploy.config import EngineConfig
from fastdeploy.entrypoints.openai.app import create_app
from fastdeploy.entrypoints.openai.engine_client import EngineClient, State
from fastdeploy.entrypoints.openai.options import ServeConfig
from fastdeploy.entrypoints.openai.replica import Replica

from .conftest import TINY, wait_until

SCRIPTED = Path(__file__).with_name("scripted_worker.py")


@contextmanager
def served_by(script: str) -> Iterator[tuple[Replica, int]]:
    """The replica and the port of its API."""
    config = EngineConfig(model=TINY)
    engine = EngineClient(config, 0, print, [sys.executable, str(SCRIPTED), script])
    replica = Replica(ServeConfig(config, "tiny"), engine)
    app = create_app(replica)

    def named_as_by_gunicorn(environ: dict[str, Any], start_response: Any) -> Any:
        environ["gunicorn.socket"] = environ["werkzeug.socket"]
        return app(environ, start_response)

    engine.start()
    server = make_server("127.0.0.1", 0, named_as_by_gunicorn, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        wait_until(lambda: engine.status.state is State.READY, "ready")
        yield replica, server.port
    finally:
        engine.close(timeout=1)
        server.shutdown()
        thread.join()
        server.server_close()


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
    with served_by(script) as (replica, port):
        leaving = ask(port, stream)
        if stream and script.startswith("says"):
            with leaving.getresponse() as answer:
                assert answer.readline().startswith(b"data: {")
        else:
            wait_until(lambda: b"requests_number_total 1.0" in replica.metrics.render(), "it is under way")
        leaving.close()
        assert replica.wait_until_idle(30)
        # A worker that had not been told would take this for a message of another kind, and die of it.
        staying = ask(port, stream=False)
        assert staying.getresponse().status == 200
        staying.close()
