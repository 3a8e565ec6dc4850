"""A router as seen by a replica."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeRouter:
    """Keeps posted bodies and answers `status`, after calling `before_answer` with the path."""

    def __init__(self) -> None:
        self.status = 200
        self.posts: list[tuple[str, dict[str, Any]]] = []
        #: Authorization header of each post.
        self.keys: list[str | None] = []
        self.before_answer: Callable[[str], object] = lambda path: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.keys.append(self.headers["Authorization"])
                outer.posts.append((self.path, json.loads(body)))
                outer.before_answer(self.path)
                answer = b'{"code":503,"msg":"not healthy"}' if outer.status != 200 else b"{}"
                # The client may have given up.
                with contextlib.suppress(OSError):
                    self.send_response(outer.status)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        return [path for path, _ in self.posts]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for posted, body in self.posts if posted == path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
