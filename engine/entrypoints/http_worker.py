"""gunicorn's threaded worker with its rough edges filed off, for router and replicas alike.

* The last words on a connection are waited for in its own thread. gunicorn does it in the loop that accepts,
  where one client which does not close holds up all others for two seconds.
* A client that stops in the middle of its request, or of reading its answer, does not keep a thread for ever.
* An answer that was broken off ends in a reset; a plain close could be taken for its end.
* A worker that is stopping lets go of its port at once.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import ThreadWorker

#: Seconds that a client may make us wait for its next bytes.
_READ_TIMEOUT = struct.pack("ll", 30, 0)
#: Seconds that a client may leave its answer unread when the kernel's buffers are full.
_WRITE_TIMEOUT = struct.pack("ll", 60, 0)


class HttpWorker(ThreadWorker):
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

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if not self.alive:
            # Left open, as gunicorn has it, the port would go on taking connections that nobody serves.
            for listener in self.sockets:
                listener.close()


def _farewell(sock: socket.socket) -> None:
    if sock.fileno() < 0:
        return
    on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    if on and seconds == 0:
        sock.close()  # the application asked for a reset
    else:
        sock.setblocking(True)
        util.close_graceful(sock)
