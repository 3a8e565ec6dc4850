"""The command `fastdeploy` as a process, and a server that answers as a test wants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FASTDEPLOY = (sys.executable, "-m", "fastdeploy.entrypoints.cli.main")


def start(*words: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FASTDEPLOY, *words],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        env=_environment(env),
        **options,
    )


def run(*words: str, env: dict[str, str] | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FASTDEPLOY, *words],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=_environment(env),
    )


def _environment(changes: dict[str, str] | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("API_KEY")}
    return {**kept, **(changes or {})}


class ScriptedServer:
    """Serves /v1/models; a POST is answered by `post`, which may wait for `released`."""

    def __init__(self, post: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]) -> None:
        #: Headers of the requests.
        self.headers: list[dict[str, str]] = []
        #: Bodies of the POST requests.
        self.bodies: list[dict[str, Any]] = []
        self.released = threading.Event()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                scripted.headers.append(dict(self.headers))
                send_json(self, 200, {"data": [{"id": "scripted"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.headers.append(dict(self.headers))
                scripted.bodies.append(body)
                post(self, body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients are killed while they wait."""


def silent_server() -> ScriptedServer:
    """Return a server that answers no POST."""

    def wait(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        server.released.wait()

    server = ScriptedServer(wait)
    return server


def send_json(handler: BaseHTTPRequestHandler, status: int, value: Any) -> None:
    data = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def send_event(handler: BaseHTTPRequestHandler, text: str) -> None:
    """Send an event of a chat or of a completion."""
    choice = {"index": 0, "delta": {"content": text}, "text": text, "finish_reason": None}
    handler.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
    handler.wfile.flush()


def begin_stream(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Connection", "close")
    handler.end_headers()
