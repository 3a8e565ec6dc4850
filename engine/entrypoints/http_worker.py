"""gunicorn's threaded worker for replicas, with these differences:

* A connection occupies a thread only while it has a request. In gunicorn a thread waits for the first bytes
  of each new connection, so that idle connections block all others.
* At the connection limit the connection that has been idle longest is closed. gunicorn stops accepting
  instead, so that one client can occupy the whole server.
* A closing connection lingers in its own thread. In gunicorn it lingers in the accept loop, where one client
  that does not close delays all others by two seconds.
* A client that stops sending its request or reading its response does not hold a thread forever.
* Malformed HTTP gets an error body in the API's format, not an HTML page.
* A response that was cut off ends with a reset; a normal close could be taken for its end.
* An exception of one connection is logged. In gunicorn it would end the loop, and with it all requests.
* A stopping worker closes its port at once and does not wait for connections without a request.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import struct
import time
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn import util
from gunicorn.http import errors
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

#: `struct timeval`: limit of the wait for a client's next bytes.
_READ_TIMEOUT = struct.pack("ll", 30, 0)
#: `struct timeval`: limit of the wait for a client to read, once the kernel's buffers are full.
_WRITE_TIMEOUT = struct.pack("ll", 60, 0)
#: Errors of accept(2) if descriptors or memory have run out, and the seconds before a retry.
_RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_SECONDS = 0.2

#: Parse error -> HTTP status; 400 for all others.
_STATUSES = {
    errors.LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    errors.LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
}


class HttpWorker(ThreadWorker):
    """Worker with one event loop and a pool of request threads.

    Everything but `handle` runs in the loop's thread, which owns the idle connections, oldest first:
    `pending_conns` have sent nothing yet, `keepalived_conns` have had a response. gunicorn closes both kinds
    at their `timeout`.
    """

    def enqueue_req(self, conn: Any) -> None:
        if conn.data_ready or conn.initialized:
            super().enqueue_req(conn)
        else:
            self._wait_for_first_bytes(conn)

    def handle(self, conn: Any) -> Any:
        """Serve one request, in a thread of the pool."""
        # Kernel timeouts apply to gunicorn's parser and to the application.
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _READ_TIMEOUT)
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _WRITE_TIMEOUT)
        keep = super().handle(conn)
        if keep is False:
            _close_gracefully(conn.sock)
            # The loop closes the connection's socket and lingers: give it one that closes at once.
            conn.sock = socket.socket()
        return keep

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        ours = errors.InvalidResponseHeader | errors.InvalidResponseHeaderName
        if isinstance(exc, ours) or not isinstance(exc, errors.ParseException):
            super().handle_error(req, client, addr, exc)
            return
        status = _STATUSES.get(type(exc), HTTPStatus.BAD_REQUEST)
        self.log.warning(
            "refused a malformed request of %s: %d %s", addr[0] if addr else "a client", status, exc
        )
        error = {"message": str(exc), "type": "invalid_request_error", "param": None, "code": "bad_http"}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            util.write_nonblock(client, head.encode() + body)
        except OSError as failure:
            self.log.debug("the error response was not sent: %s", failure)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        for key, _ in self.poller.select(timeout):
            try:
                key.data(key.fileobj)
            except Exception as error:
                self.log.error("connection failed: %s: %s", type(error).__name__, error)
                if isinstance(error, OSError) and error.errno in _RESOURCE_ERRORS:
                    time.sleep(_RETRY_SECONDS)
        # Here and not on accept, because gunicorn does not poll for new connections at the limit.
        self._make_room()

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if not self.alive:
            # gunicorn leaves the port open, so that the kernel accepts connections that no thread serves.
            for listener in self.sockets:
                listener.close()
            # gunicorn limits the wait for keep-alive connections only.
            soon = time.monotonic() + STOP_KEEPALIVE_LINGER
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, soon)

    def _wait_for_first_bytes(self, conn: Any) -> None:
        """Poll a new connection in the loop, as gunicorn does after its wait in a thread."""
        conn.set_timeout()
        self.pending_conns.append(conn)
        readable = partial(self.on_pending_socket_readable, conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, readable)

    def _make_room(self) -> None:
        """At the connection limit, close the connection that has been idle longest."""
        while self.nr_conns >= self.worker_connections:
            idle = [conns[0] for conns in (self.pending_conns, self.keepalived_conns) if conns]
            if not idle:
                return
            min(idle, key=lambda conn: conn.timeout).timeout = 0.0
            self.murder_pending()
            self.murder_keepalived()


def _close_gracefully(sock: socket.socket) -> None:
    if sock.fileno() < 0:
        return
    on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    if on and seconds == 0:
        sock.close()  # the application asked for a reset
    else:
        sock.setblocking(True)
        util.close_graceful(sock)
