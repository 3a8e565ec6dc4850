"""gunicorn's threaded worker with its rough edges filed off, for the replicas.

* A connection costs a thread only while a request is on it. gunicorn lets a thread wait for the first bytes
  of each new one, so that idle ones, by the hundred, keep all others waiting.
* Where connections are at their limit the one that has been idle longest is closed. gunicorn stops accepting
  instead, and whoever opens enough connections has the server to himself.
* The last words on a connection are waited for in its own thread. gunicorn does it in the loop that accepts,
  where one client which does not close holds up all others for two seconds.
* A client that stops in the middle of its request, or of reading its answer, does not keep a thread for ever.
* What is no HTTP is refused with the error body that clients of the API know, not with a page.
* An answer that was broken off ends in a reset; a plain close could be taken for its end.
* An exception of one connection is logged; in gunicorn it would end the loop, and with it all requests.
* A worker that is stopping lets go of its port at once, and does not wait for connections without a request.
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

#: Seconds that a client may make us wait for its next bytes.
_READ_TIMEOUT = struct.pack("ll", 30, 0)
#: Seconds that a client may leave its answer unread when the kernel's buffers are full.
_WRITE_TIMEOUT = struct.pack("ll", 60, 0)
#: What accept(2) reports as long as there is no descriptor or memory for a new connection, and the seconds
#: before the next try.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SHORTAGE_PAUSE = 0.2

#: Of requests that cannot be parsed; 400 for all others.
_STATUSES = {
    errors.LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    errors.LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
}


class HttpWorker(ThreadWorker):
    """Everything but `handle` runs in the loop's thread, which alone knows the idle connections.

    There are two kinds, each oldest first: `pending_conns` have sent nothing yet, `keepalived_conns` have
    had an answer. gunicorn closes either when its `timeout` has come.
    """

    def enqueue_req(self, conn: Any) -> None:
        if conn.data_ready or conn.initialized:
            super().enqueue_req(conn)
        else:
            self._wait_for_first_bytes(conn)

    def handle(self, conn: Any) -> Any:
        """Runs in a thread of the pool."""
        # The kernel's timeouts: they hold in gunicorn's parser and in the application alike.
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _READ_TIMEOUT)
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _WRITE_TIMEOUT)
        keep = super().handle(conn)
        if keep is False:
            _farewell(conn.sock)
            # The loop will close the connection's socket: it gets one for which there is nothing to wait.
            conn.sock = socket.socket()
        return keep

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        ours = errors.InvalidResponseHeader | errors.InvalidResponseHeaderName
        if isinstance(exc, ours) or not isinstance(exc, errors.ParseException):
            super().handle_error(req, client, addr, exc)
            return
        status = _STATUSES.get(type(exc), HTTPStatus.BAD_REQUEST)
        self.log.warning("refused what %s sent: %d %s", addr[0] if addr else "a client", status, exc)
        error = {"message": str(exc), "type": "invalid_request_error", "param": None, "code": "bad_http"}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            util.write_nonblock(client, head.encode() + body)
        except OSError as failure:
            self.log.debug("the client was not told: %s", failure)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        for key, _ in self.poller.select(timeout):
            try:
                key.data(key.fileobj)
            except Exception as error:
                self.log.error("a connection failed: %s: %s", type(error).__name__, error)
                if isinstance(error, OSError) and error.errno in _SHORTAGES:
                    time.sleep(_SHORTAGE_PAUSE)
        # Here rather than on accepting: at the limit gunicorn would not even look for new connections.
        self._make_room()

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if not self.alive:
            # Left open, as gunicorn has it, the port would go on taking connections that nobody serves.
            for listener in self.sockets:
                listener.close()
            # gunicorn limits its wait for kept connections only.
            soon = time.monotonic() + STOP_KEEPALIVE_LINGER
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, soon)

    def _wait_for_first_bytes(self, conn: Any) -> None:
        """What gunicorn does after its wait in a thread was in vain."""
        conn.set_timeout()
        self.pending_conns.append(conn)
        readable = partial(self.on_pending_socket_readable, conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, readable)

    def _make_room(self) -> None:
        """For one more connection, if any is idle; one that has sent something is not."""
        while self.nr_conns >= self.worker_connections:
            idle = [conns[0] for conns in (self.pending_conns, self.keepalived_conns) if conns]
            if not idle:
                return
            min(idle, key=lambda conn: conn.timeout).timeout = 0.0
            self.murder_pending()
            self.murder_keepalived()


def _farewell(sock: socket.socket) -> None:
    if sock.fileno() < 0:
        return
    on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    if on and seconds == 0:
        sock.close()  # the application asked for a reset
    else:
        sock.setblocking(True)
        util.close_graceful(sock)
