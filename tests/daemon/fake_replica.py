"""A program that behaves, on its ports, as a replica does. Flags request misbehaviour.

--load-seconds S    /health says "loading" for S seconds
--die-while-loading exits with code 3 instead of becoming ready
--gpu-fault FILE    while FILE exists, reports that its GPU has failed and exits with code 3
--no-word           /v1/completions answers 500
--grandchild        starts a process in a session of its own, which ignores SIGTERM
--ignore-term       ignores SIGTERM itself
--hang-file FILE    while FILE exists, /health does not answer
--stuck-file FILE   reports a worker that is deadlocked: while FILE exists, it has a request in hand
--unknown           does not register with the router

A stream continues for --timeout-graceful-shutdown seconds after SIGTERM, and ends with an error event.
"""

import argparse
import http.client
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
parser.add_argument("--router")
parser.add_argument("--local-data-parallel-id", type=int)
parser.add_argument("--load-seconds", type=float, default=0.0)
parser.add_argument("--hang-file", type=Path)
parser.add_argument("--stuck-file", type=Path)
parser.add_argument("--gpu-fault", type=Path)
parser.add_argument("--api-keys-file", type=Path)
parser.add_argument("--timeout-graceful-shutdown", type=float, default=10.0)
for flag in ("--die-while-loading", "--no-word", "--grandchild", "--ignore-term", "--unknown"):
    parser.add_argument(flag, action="store_true")
# The other flags of a real replica have no effect here.
options, _ = parser.parse_known_args()
started = time.monotonic()
key = options.api_keys_file.read_text().split()[0] if options.api_keys_file else os.environ.get("FD_API_KEY")
streaming = ending = False
#: Keeps a registration in progress from arriving after the deregistration.
talking = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        while options.hang_file and options.hang_file.exists():
            time.sleep(0.05)
        loaded = time.monotonic() - started
        if loaded < options.load_seconds:
            self._answer(503, {"status": "loading", "progress": loaded / options.load_seconds})
        else:
            self._answer(200, {"status": "ready", "worker": pulse()})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self._answer(401, {"error": {"message": "a valid API key is needed"}})
        elif body.get("stream"):
            self._stream()
        elif options.no_word:
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


def pulse() -> dict[str, float]:
    try:
        silent = time.time() - options.stuck_file.stat().st_mtime
    except (AttributeError, FileNotFoundError):
        silent = 0.0
    return {"pid": os.getpid(), "steps": 1, "requests": int(silent > 0), "silent": silent}


def tell_router(path: str) -> bool:
    host, _, port = options.router.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=2)
    body = {"host_ip": "127.0.0.1", "port": options.port, "replica": options.local_data_parallel_id}
    try:
        connection.request("POST", path, json.dumps(body))
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def register() -> None:
    time.sleep(options.load_seconds)
    while not ending:
        with talking:
            known = not ending and tell_router("/register")
        time.sleep(0.5 if known else 0.1)


def end(*_: object) -> None:
    global ending
    if ending:
        return
    ending = True
    if not options.unknown:
        with talking:
            tell_router("/deregister")
    if not streaming:
        os._exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_term else end)
if options.grandchild:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
if options.stuck_file:
    code = """import faulthandler, signal, threading
faulthandler.register(signal.SIGUSR2)
def deadlocked(lock):
    with lock, lock:
        pass
deadlocked(threading.Lock())"""
    subprocess.Popen([sys.executable, "-c", code])
print(f"fake replica on port {options.port}", flush=True)
if options.die_while_loading:
    time.sleep(options.load_seconds)
    print("fake: ERROR (cannot load: no such checkpoint)", flush=True)
    sys.exit(3)
server = http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
if not options.unknown:
    threading.Thread(target=register, daemon=True).start()
while True:
    if options.gpu_fault and options.gpu_fault.exists():
        options.gpu_fault.unlink()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S,999")
        fault = "replica stops: GPU: a step: unspecified launch failure (PCI 0000:1b:00.0)"
        print(f"{stamp} ERROR replica=0 fastdeploy: {fault}", flush=True)
        os._exit(3)
    # Not signal.pause(): it would delay a signal that arrived just before it.
    time.sleep(0.1)
