"""A program that behaves, on its ports, as a replica or a router does. Misbehaviour is asked for by flags.

--load-seconds S    /health says "loading" for so long
--die-while-loading exits with code 3 instead of becoming ready
--no-token          /v1/completions answers 500
--grandchild        starts a process in a session of its own, which ignores SIGTERM
--ignore-term       ignores SIGTERM itself
--hang-file FILE    while FILE exists, /health does not answer

A stream goes on until SIGTERM and --timeout-graceful-shutdown seconds more, and ends with an error event.
"""

import argparse
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--load-seconds", type=float, default=0.0)
parser.add_argument("--hang-file", type=Path)
parser.add_argument("--timeout-graceful-shutdown", type=float, default=10.0)
for flag in ("--die-while-loading", "--no-token", "--grandchild", "--ignore-term"):
    parser.add_argument(flag, action="store_true")
# The rest of a replica's real command line means nothing here.
options, _ = parser.parse_known_args()
started = time.monotonic()
key = os.environ.get("FD_API_KEY")
streaming = ending = False


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        while options.hang_file and options.hang_file.exists():
            time.sleep(0.05)
        loaded = time.monotonic() - started
        if self.path == "/registered":
            self._answer(200, {"mixed": [{"replica": number, "in_flight": 0} for number in range(64)]})
        elif loaded < options.load_seconds:
            self._answer(503, {"status": "loading", "progress": loaded / options.load_seconds})
        else:
            self._answer(200, {"status": "ready"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self._answer(401, {"error": {"message": "a valid API key is needed"}})
        elif body.get("stream"):
            self._stream()
        elif options.no_token:
            self._answer(500, {"error": {"message": "the network returns NaN"}})
        else:
            self._answer(200, {"choices": [{"text": " world"}]})

    def _stream(self) -> None:
        global streaming
        streaming = True
        self.send_response(200)
        self.end_headers()
        while not ending:
            self.wfile.write(b"data: {}\n\n")
            time.sleep(0.05)
        time.sleep(options.timeout_graceful_shutdown)
        self.wfile.write(b'data: {"error": {"message": "the replica stops"}}\n\n')
        os._exit(0)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def end(*_: object) -> None:
    global ending
    ending = True
    if not streaming:
        os._exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_term else end)
if options.grandchild:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(f"fake replica on port {options.port}", flush=True)
if options.die_while_loading:
    time.sleep(options.load_seconds)
    print("fake: ERROR (cannot load: no such checkpoint)", flush=True)
    sys.exit(3)
server = http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    signal.pause()
