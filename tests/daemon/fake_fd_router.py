"""A program that behaves towards daemon and replicas as fd-router does, but relays nothing.

It reads its flags from its --flags-file and refuses a --queue-size below 0. The file in-flight-NUMBER
beside the admin socket, if there is one, holds the number of requests in flight at a replica.
"""

import argparse
import contextlib
import http.server
import json
import os
import signal
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fastdeploy.daemon.router.config.flags_file import fingerprint

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--queue-size", type=int, default=0)
parser.add_argument("--registry-file", type=Path, required=True)
parser.add_argument("--admin-socket", type=Path, required=True)


def read_flags(file: Path) -> tuple[argparse.Namespace, str]:
    content = file.read_bytes()
    # The other flags of the real router have no effect here.
    options, _ = parser.parse_known_args(json.loads(content))
    if options.queue_size < 0:
        raise ValueError("--queue-size")
    return options, fingerprint(content)


class Board:
    """The registered replicas by URL, in the form in which the router shows them."""

    def __init__(self, file: Path, run: Path) -> None:
        self._file, self._run = file, run
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError):
            self._rows = json.loads(file.read_text())

    def register(self, fields: dict[str, Any]) -> None:
        url = f"http://{fields['host_ip']}:{fields['port']}"
        with self._lock:
            draining = self._rows.get(url, {}).get("draining", False)
            row = {"url": url, "replica": fields["replica"], "draining": draining, "leaving": False}
            self._set(url, row)

    def deregister(self, fields: dict[str, Any]) -> None:
        url = f"http://{fields['host_ip']}:{fields['port']}"
        with self._lock:
            row = self._rows.get(url)
            self._set(url, {**row, "leaving": True} if row and row["draining"] else None)

    def order(self, authority: str, draining: bool) -> bool:
        url = f"http://{authority}"
        with self._lock:
            row = self._rows.get(url)
            if row is None:
                return False
            self._set(url, {**row, "draining": draining} if draining or not row["leaving"] else None)
            return True

    def registered(self) -> dict[str, Any]:
        with self._lock:
            rows = [
                {**row, "in_flight": self._in_flight(row), "in_flight_elsewhere": 0} for row in self.rows()
            ]
        up = [row for row in rows if not row["leaving"]]
        return {"mixed": up, "down": [row for row in rows if row not in up]}

    def rows(self) -> list[dict[str, Any]]:
        return [*self._rows.values()]

    def _set(self, url: str, row: dict[str, Any] | None) -> None:
        self._rows.pop(url, None)
        if row is not None:
            self._rows[url] = row
        self._file.parent.mkdir(parents=True, exist_ok=True)
        aside = self._file.with_suffix(".new")
        aside.write_text(json.dumps(self._rows))
        aside.rename(self._file)

    def _in_flight(self, row: dict[str, Any]) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self._run / f"in-flight-{row['replica']}").read_text())
        return 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/registered":
            self._answer(200, board.registered())
        else:
            reload = {"number": reloads, "outcome": outcome}
            self._answer(200, {"status": "ok", "flags": flags, "reload": reload})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/register":
            board.register(json.loads(body))
        elif self.path == "/deregister":
            board.deregister(json.loads(body))
        else:
            _, _, _, authority, order = self.path.split("/")
            if not board.order(authority, order == "drain"):
                self._answer(404, {})
                return
        self._answer(200, {})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class AdminServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def reload(*_: object) -> None:
    global flags, reloads, outcome
    reloads += 1
    try:
        flags = read_flags(file)[1]
        outcome = "done"
    except ValueError:
        outcome = "refused"


file = Path(sys.argv[sys.argv.index("--flags-file") + 1])
options, flags = read_flags(file)
reloads, outcome = 0, "done"
board = Board(options.registry_file, options.admin_socket.parent)
signal.signal(signal.SIGHUP, reload)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
options.admin_socket.unlink(missing_ok=True)
print(f"fake router on port {options.port}", flush=True)
tcp = http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
admin = AdminServer(str(options.admin_socket), Handler)
for server in (tcp, admin):
    threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    # Not signal.pause(): it would delay a signal that arrived just before it.
    time.sleep(0.1)
