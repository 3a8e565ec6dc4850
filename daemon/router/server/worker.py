"""gunicorn worker of the router: an event loop for the data plane, threads for the control plane."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvloop
from gunicorn.workers.base import Worker

from ....common.api_paths import ABORT_PATH, is_raw_api_path, is_raw_path_for_pages
from ....common.tracing import start_tracing
from ..control.app import ControlPlane
from ..control.wsgi import WsgiCall
from ..http.client import ClientConnection, Task
from ..http.cors import CorsClient, Preflight, cors_lines, is_preflight, preflight_answer
from ..http.protocols import Client
from ..http.request import ClientRequest
from ..http.responses import header_lines
from ..relay.data_plane import DataPlane

logger = logging.getLogger(__name__)

#: Seconds between two checks of timeouts.
_TICK = 0.2
#: Threads of the control plane, most of them for registrations that wait for a health check.
_THREADS = 64
#: Seconds from accepting the last connection until the worker knows of it, without and with TLS.
_ACCEPT_SECONDS, _HANDSHAKE_SECONDS = 0.05, 2.0
#: Keep-alive seconds of connections while the router stops.
_STOPPING_KEEP_ALIVE = 1.0
_ABORT_PATH = ABORT_PATH.encode()


class RouterWorker(Worker):
    """Implements `client.Server`. Methods that are not gunicorn's are called by the event loop.

    A worker ends in two ways, both without losing a request in flight. If it is replaced (SIGUSR2),
    connections without a request stay open for their full keep-alive time, because a client may just be
    sending its next request; its response is the last on that connection. If the router stops (SIGTERM), they
    stay open for a second. Requests have no limit but the usual timeouts of clients and replicas.
    """

    is_stopping = False

    def __init__(self, *arguments: Any) -> None:
        """Called in the arbiter, before the fork."""
        super().__init__(*arguments)
        self._made_at = self.tmp.last_update()
        self._to_worker, self._from_arbiter = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self._to_worker, self._from_arbiter):
            end.setblocking(False)

    @property
    def is_ready(self) -> bool:
        """True after the first heartbeat, which a worker sends once it listens. Read in the arbiter."""
        return bool(self.tmp.last_update() != self._made_at)

    def pass_listener(self, listener: socket.socket) -> None:
        """Pass a new admin socket to the worker. Called in the arbiter."""
        try:
            socket.send_fds(self._to_worker, [b"."], [listener.fileno()])
        except OSError as error:
            logger.warning("the new admin socket cannot be passed to worker %s: %s", self.pid, error)

    def run(self) -> None:
        self.connections: set[ClientConnection] = set()
        self._tracing = start_tracing(self.wsgi.settings.tracing, "fd-router", f"worker {self.pid}")
        # Objects that exist now stay, and later ones form few cycles.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    def init_signals(self) -> None:
        """Use default handlers until the event loop sets its own, so that signals end a starting worker."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGWINCH, signal.SIG_IGN)

    # ---- client.Server

    #: Without a Python function around it, because it is called twice for each request.
    now = staticmethod(time.monotonic)

    def opened(self, connection: ClientConnection) -> None:
        self.connections.add(connection)
        if len(self.connections) > self._max_connections:
            # Close the one that has been longest without a complete request, idle or slow; it is the new one
            # if all others have requests in flight.
            waiting = [
                (since, id(each), each)
                for each in self.connections
                if (since := each.waits_since) is not None
            ]
            min(waiting)[2].close()

    def closed(self, connection: ClientConnection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._is_empty.set()

    def serve(self, client: Client, request: ClientRequest) -> Task:
        path = request.raw_path
        if b"origin" in request.special and is_raw_path_for_pages(path):
            if is_preflight(request):
                return self._answer_preflight(client, request)
            lines = cors_lines(self._router.settings.cors, request.special[b"origin"])
            client = CorsClient(client, lines)
        if is_raw_api_path(path) and path != _ABORT_PATH:
            return self._plane.begin(client, request)
        metrics = self._router.metrics
        # The request may be for /metrics.
        metrics.flush()
        return WsgiCall(self._router, self._executor, metrics, client, request)

    def refused(self, method: str, target: bytes, status: int) -> None:
        self._router.metrics.answered(method, target.partition(b"?")[0].decode("latin-1"), status, 0.0)

    def cors_lines(self, target: bytes, origin: bytes) -> bytes:
        is_for_pages = is_raw_path_for_pages(target.partition(b"?")[0])
        return cors_lines(self._router.settings.cors, origin) if is_for_pages else b""

    def _answer_preflight(self, client: Client, request: ClientRequest) -> Task:
        answer = preflight_answer(self._router.settings.cors, request)
        client.respond(answer.status_line.encode(), header_lines(answer.headers), answer.body)
        self._router.metrics.answered(request.method, request.path, answer.status, 0.0)
        return Preflight()

    # ---- lifecycle

    async def _serve(self) -> None:
        self._router: ControlPlane = self.wsgi
        settings = self._router.settings
        self._max_connections = settings.max_connections
        self.max_body_bytes = settings.max_body_bytes
        self.client_timeout, self.keep_alive = settings.client_timeout, settings.keep_alive
        self._plane = DataPlane(settings, self._router.board, self._router.metrics, self._tracing)
        self.outbox = self._plane.outbox
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="control")
        self._is_empty = asyncio.Event()
        self._stop = asyncio.Event()
        self._handle_signals()
        servers = [await self._listen(listener.sock) for listener in self.sockets]
        replacing = asyncio.create_task(self._replace_admin_socket(servers))
        ticking = asyncio.create_task(self._tick())
        await self._stop.wait()
        replacing.cancel()
        for server in servers:
            server.close()
        await self._drain()
        ticking.cancel()
        self._router.metrics.flush()
        self._plane.access_log.flush()
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._tracing is not None:
            self._tracing.close()

    async def _listen(self, sock: socket.socket) -> asyncio.Server:
        # The arbiter has read the certificate: an invalid file later must not prevent a worker's start.
        tls = self._router.settings.tls if sock.family != socket.AF_UNIX else None
        return await asyncio.get_running_loop().create_server(
            lambda: ClientConnection(self), sock=sock, ssl=tls, backlog=2048
        )

    async def _replace_admin_socket(self, servers: list[asyncio.Server]) -> None:
        """Listen on each socket that the arbiter passes in place of a removed admin socket."""
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._from_arbiter, arrived.set)
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                try:
                    _, descriptors, *_ = socket.recv_fds(self._from_arbiter, 1, 1)
                    for descriptor in descriptors:
                        for old in [server for server in servers if _is_admin(server)]:
                            servers.remove(old)
                            old.close()
                        servers.append(await self._listen(socket.socket(fileno=descriptor)))
                except BlockingIOError:
                    continue
                except OSError as error:
                    logger.error("the new admin socket cannot be used by this worker: %s", error)
        finally:
            # A socket that arrives while the worker drains would wake the loop again and again.
            loop.remove_reader(self._from_arbiter)

    async def _drain(self) -> None:
        """Wait until the last connection has ended."""
        self.is_stopping = True
        is_hurried = self.keep_alive <= _STOPPING_KEEP_ALIVE
        has_handshakes = self._router.settings.tls is not None and not is_hurried
        await asyncio.sleep(_HANDSHAKE_SECONDS if has_handshakes else _ACCEPT_SECONDS)
        while self.connections:
            self._is_empty.clear()
            await self._is_empty.wait()

    async def _tick(self) -> None:
        heartbeat_at = 0.0
        while True:
            now = time.monotonic()
            try:
                if now - heartbeat_at >= 1.0 or self.is_stopping:
                    heartbeat_at = now
                    self.notify()
                    self._watch_connections(now)
                    if os.getppid() != self.ppid:
                        self._end_soon()
                self._plane.tick(now)
            except Exception:
                # An error in one request must not end the heartbeat: the arbiter would kill the worker.
                logger.exception("a periodic task of the worker failed")
            await asyncio.sleep(_TICK)

    def _watch_connections(self, now: float) -> None:
        for connection in list(self.connections):
            try:
                connection.watch(now)
            except Exception:
                logger.exception("internal error in a client's connection; the connection is closed")
                # Its state is unknown, and it would fail again in the next round.
                self.connections.discard(connection)
                with contextlib.suppress(Exception):
                    connection.abort_for("has a broken connection")

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end_soon)
        loop.add_signal_handler(signal.SIGUSR2, self._end_gracefully)
        for number in (signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, self._end_at_once, 0)
        loop.add_signal_handler(signal.SIGABRT, self._end_at_once, 1)
        loop.add_signal_handler(signal.SIGUSR1, self.log.reopen_files)

    def _end_gracefully(self) -> None:
        self._router.board.resign()
        self._stop.set()

    def _end_soon(self) -> None:
        self.keep_alive = min(self.keep_alive, _STOPPING_KEEP_ALIVE)
        self._stop.set()

    def _end_at_once(self, code: int) -> None:
        """End without the exit handlers of Python, which wait for threads."""
        self.outbox.flush()
        self._plane.access_log.flush()
        os._exit(code)


def _is_admin(server: asyncio.Server) -> bool:
    return any(listener.family == socket.AF_UNIX for listener in server.sockets)
