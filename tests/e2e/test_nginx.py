"""A real nginx with the shipped configuration, in front of fake replicas."""

from __future__ import annotations

import http.client
import json
import re
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ..ports import accepts, free_ports
from ..system_packages import needs
from .conftest import wait_until

CONFIG = Path(__file__).parents[2] / "etc" / "nginx.conf"

pytestmark = [pytest.mark.e2e, needs("nginx")]


class Replica:
    """An HTTP server whose answers are set by a test: `answer` is called with the handler of each request."""

    def __init__(self) -> None:
        self.answer: Callable[[BaseHTTPRequestHandler], None] = text("fine")
        self.seen: list[BaseHTTPRequestHandler] = []
        self.bodies: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(self)
                outer.answer(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def text(content: str, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content.encode())

    return answer


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    replicas = [Replica(), Replica()]
    yield replicas
    for replica in replicas:
        replica.close()


@pytest.fixture
def nginx(replicas: list[Replica], tmp_path: Path) -> Iterator[int]:
    """The port of an nginx with the shipped file, adapted to the ports and number of the replicas."""
    (port,) = free_ports(1)
    lines = CONFIG.read_text().replace("listen 127.0.0.1:8080", f"listen 127.0.0.1:{port}").splitlines()
    servers = [line for line in lines if line.strip().startswith("server 127.0.0.1:")]
    assert len(servers) == 8
    for number, line in enumerate(servers):
        where = lines.index(line)
        if number < len(replicas):
            lines[where] = re.sub(r":\d+", f":{replicas[number].port}", line)
        else:
            del lines[where]
    config = tmp_path / "nginx.conf"
    config.write_text("\n".join(lines))
    command = ["nginx", "-p", str(tmp_path), "-e", "stderr", "-c", str(config)]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"])
    try:
        wait_until(lambda: accepts(port), "nginx listens")
        yield port
    finally:
        process.terminate()
        process.wait(20)


def post(port: int, body: bytes = b"{}", path: str = "/v1/chat/completions") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body)
    return connection.getresponse()


def test_the_shipped_file_is_valid_and_names_the_eight_documented_ports(tmp_path: Path) -> None:
    command = ["nginx", "-t", "-p", str(tmp_path), "-e", "stderr", "-c", str(CONFIG)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    ports = [
        int(port) for port in re.findall(r"^\s+server 127\.0\.0\.1:(\d+)", CONFIG.read_text(), re.MULTILINE)
    ]
    assert ports == [1811, 1822, 1833, 1844, 1855, 1866, 1877, 1888]


def test_requests_at_the_same_time_are_spread_evenly(nginx: int, replicas: list[Replica]) -> None:
    release = threading.Event()

    def wait(handler: BaseHTTPRequestHandler) -> None:
        release.wait(60)
        text("fine")(handler)

    for replica in replicas:
        replica.answer = wait
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(post, nginx) for _ in range(8)]
        wait_until(lambda: sum(len(replica.seen) for replica in replicas) == 8, "all requests have arrived")
        release.set()
        assert [answer.result().status for answer in answers] == [200] * 8
    assert [len(replica.seen) for replica in replicas] == [4, 4]


def test_events_of_a_stream_are_not_held_back(nginx: int, replicas: list[Replica]) -> None:
    first_was_read = threading.Event()

    def stream(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"d\r\ndata: first\n\n\r\n")
        first_was_read.wait(60)
        handler.wfile.write(b"e\r\ndata: second\n\n\r\n0\r\n\r\n")

    for replica in replicas:
        replica.answer = stream
    answer = post(nginx)
    assert answer.readline() == b"data: first\n"
    first_was_read.set()
    assert answer.read() == b"\ndata: second\n\n"


def test_disconnect_ends_the_request_at_the_replica(nginx: int, replicas: list[Replica]) -> None:
    gone = threading.Event()

    def wait(handler: BaseHTTPRequestHandler) -> None:
        # The connection becomes readable without a second request when nginx closes it.
        select.select([handler.connection], [], [], 60)
        if handler.connection.recv(1) == b"":
            gone.set()
        handler.close_connection = True

    for replica in replicas:
        replica.answer = wait
    connection = http.client.HTTPConnection("127.0.0.1", nginx, timeout=60)
    connection.request("POST", "/v1/chat/completions", b"{}")
    wait_until(lambda: any(replica.seen for replica in replicas), "the request has arrived")
    connection.close()
    assert gone.wait(60)


def test_a_replica_that_is_loading_or_dead_is_passed_over(nginx: int, replicas: list[Replica]) -> None:
    replicas[0].answer = text("loading", status=503)
    bodies = [post(nginx, b'{"number": %d}' % number) for number in range(4)]
    assert [answer.read() for answer in bodies] == [b"fine"] * 4
    assert len(replicas[1].seen) == 4
    replicas[0].close()
    assert [post(nginx).status for _ in range(4)] == [200] * 4


def test_status_and_body_of_a_replicas_error_are_its_own(nginx: int, replicas: list[Replica]) -> None:
    for status in (400, 429, 500):
        for replica in replicas:
            replica.answer = text("why", status)
        answer = post(nginx)
        assert (answer.status, answer.read()) == (status, b"why")


def test_without_any_replica_the_answer_is_503_in_openais_form(nginx: int, replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.close()
    answer = post(nginx)
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "1"
    assert json.loads(answer.read())["error"]["code"] == "no_replica"


def test_large_bodies_pass_and_too_large_ones_are_refused_in_openais_form(
    nginx: int, replicas: list[Replica]
) -> None:
    assert post(nginx, b"x" * (10 << 20)).status == 200
    assert sum(len(body) for replica in replicas for body in replica.bodies) == 10 << 20
    answer = post(nginx, b"x" * ((10 << 20) + 1))
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"


def test_only_the_api_and_health_can_be_reached(nginx: int, replicas: list[Replica]) -> None:
    assert post(nginx, path="/health").status == 200
    for path in ("/metrics", "/internal/resume", "/"):
        answer = post(nginx, path=path)
        assert answer.status == 404
        assert json.loads(answer.read())["error"]["code"] == "not_found"
    assert sum(len(replica.seen) for replica in replicas) == 1


def test_a_request_has_one_id_from_end_to_end(nginx: int, replicas: list[Replica]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", nginx, timeout=60)
    for headers in ({"X-Request-Id": "mine"}, {}):
        connection.request("POST", "/v1/completions", b"{}", headers)
        connection.getresponse().read()
    ids = {handler.headers["X-Request-Id"] for replica in replicas for handler in replica.seen}
    assert "mine" in ids
    assert all(ids)
    assert len(ids) == 2
