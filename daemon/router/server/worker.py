"""The gunicorn worker that runs the router: an event loop for the data plane, a few threads for the rest."""

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

from ..control.app import ControlPlane
from ..control.wsgi import WsgiCall
from ..http.client import ClientConnection, Task
from ..http.cors import CorsClient, Preflight, cors_lines, is_preflight, preflight_answer
from ..http.protocols import Client
from ..http.request import ClientRequest
from ..http.responses import header_lines
from ..relay.data_plane import DataPlane

logger = logging.getLogger(__name__)

#: Seconds between two looks at what has taken too long.
_TICK = 0.2
#: Of the control plane: registrations, which wait for a health check of the one that registers.
_THREADS = 64
#: Seconds in which what was accepted last shows up: a connection; and one that has yet to agree on TLS.
_LATECOMERS, _HANDSHAKES = 0.05, 2.0
#: Seconds without a request after which a connection is closed when there is no more time.
_PARTING_SECONDS = 1.0


class RouterWorker(Worker):
    """Implements `client.Server`. What is not gunicorn's interface belongs to the event loop.

    It ends in two ways, both without the loss of a request that is under way. Replaced by another one
    (SIGUSR2) it has time: connections without a request stay for as long as they were promised, because their
    clients may just be sending the next one; its answer is their last. When the router ends (SIGTERM)
    they get a second. Requests last as long as they last: who comes to a standstill, client or replica, is
    given up by the limits that hold all the time.
    """

    is_stopping = False

    def __init__(self, *arguments: Any) -> None:
        """In the arbiter, before the fork."""
        super().__init__(*arguments)
        self._made_at = self.tmp.last_update()
        self._to_worker, self._from_arbiter = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self._to_worker, self._from_arbiter):
            end.setblocking(False)

    @property
    def is_ready(self) -> bool:
        """Whether it has given a sign of life; it listens before it does. Asked by the arbiter."""
        return bool(self.tmp.last_update() != self._made_at)

    def pass_listener(self, listener: socket.socket) -> None:
        """Pass a new admin socket to the worker. Called in the arbiter."""
        try:
            socket.send_fds(self._to_worker, [b"."], [listener.fileno()])
        except OSError as error:
            logger.warning("the new admin socket cannot be passed to worker %s: %s", self.pid, error)

    def run(self) -> None:
        self.connections: set[ClientConnection] = set()
        # What is there now stays, and there is little garbage that only a collection would find.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    def init_signals(self) -> None:
        """The loop takes them over when it runs; until then the default ends a worker that is starting."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGWINCH, signal.SIG_IGN)

    # ---- client.Server

    #: Not a call of Python's around it: it is asked twice for each request.
    now = staticmethod(time.monotonic)

    def opened(self, connection: ClientConnection) -> None:
        self.connections.add(connection)
        if len(self.connections) > self._max_connections:
            # The one that has been without a whole request longest, be it that it says nothing or too slowly.
            # It is this one, if all others have requests under way.
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
        if request.raw_path.startswith(b"/v1/"):
            if b"origin" in request.special:
                if is_preflight(request):
                    return self._answer_preflight(client, request)
                lines = cors_lines(self._router.settings.cors, request.special[b"origin"])
                client = CorsClient(client, lines)
            return self._plane.begin(client, request)
        metrics = self._router.metrics
        # Somebody may want to see them.
        metrics.flush()
        return WsgiCall(self._router, self._executor, metrics, client, request)

    def refused(self, method: str, target: bytes, status: int) -> None:
        self._router.metrics.answered(method, target.partition(b"?")[0].decode("latin-1"), status, 0.0)

    def cors_lines(self, target: bytes, origin: bytes) -> bytes:
        # Only the API is for web pages: the rest of the router is for replicas and operators.
        return cors_lines(self._router.settings.cors, origin) if target.startswith(b"/v1/") else b""

    def _answer_preflight(self, client: Client, request: ClientRequest) -> Task:
        answer = preflight_answer(self._router.settings.cors, request)
        client.respond(answer.status_line.encode(), header_lines(answer.headers), answer.body)
        self._router.metrics.answered(request.method, request.path, answer.status, 0.0)
        return Preflight()

    # ---- its life

    async def _serve(self) -> None:
        self._router: ControlPlane = self.wsgi
        settings = self._router.settings
        self._max_connections = settings.max_connections
        self.max_body_bytes = settings.max_body_bytes
        self.client_timeout, self.keep_alive = settings.client_timeout, settings.keep_alive
        self._plane = DataPlane(settings, self._router.board, self._router.metrics)
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

    async def _listen(self, sock: socket.socket) -> asyncio.Server:
        # Read by the arbiter: one that is broken by the time of a reload must not keep workers down.
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
        """Until the last connection has ended."""
        self.is_stopping = True
        is_in_a_hurry = self.keep_alive <= _PARTING_SECONDS
        may_shake_hands = self._router.settings.tls is not None and not is_in_a_hurry
        await asyncio.sleep(_HANDSHAKES if may_shake_hands else _LATECOMERS)
        while self.connections:
            self._is_empty.clear()
            await self._is_empty.wait()

    async def _tick(self) -> None:
        beat = 0.0
        while True:
            now = time.monotonic()
            try:
                if now - beat >= 1.0 or self.is_stopping:
                    beat = now
                    self.notify()
                    self._watch_connections(now)
                    if os.getppid() != self.ppid:
                        self._end_soon()
                self._plane.tick(now)
            except Exception:
                # One request's fault must not end the beat, without which the arbiter kills all of them.
                logger.exception("a periodic task of the worker failed")
            await asyncio.sleep(_TICK)

    def _watch_connections(self, now: float) -> None:
        for connection in list(self.connections):
            try:
                connection.watch(now)
            except Exception:
                logger.exception("internal error in a client's connection; the connection is closed")
                # Its state is unknown, and it would fail again at the next beat.
                self.connections.discard(connection)
                with contextlib.suppress(Exception):
                    connection.abort_for("has a broken connection")

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end_soon)
        loop.add_signal_handler(signal.SIGUSR2, self._end_some_time)
        for number in (signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, self._end_now, 0)
        loop.add_signal_handler(signal.SIGABRT, self._end_now, 1)
        loop.add_signal_handler(signal.SIGUSR1, self.log.reopen_files)

    def _end_some_time(self) -> None:
        self._router.board.resign()
        self._stop.set()

    def _end_soon(self) -> None:
        self.keep_alive = min(self.keep_alive, _PARTING_SECONDS)
        self._stop.set()

    def _end_now(self, code: int) -> None:
        """Leaving as Python does would wait for threads."""
        self.outbox.flush()
        self._plane.access_log.flush()
        os._exit(code)


def _is_admin(server: asyncio.Server) -> bool:
    return any(listener.family == socket.AF_UNIX for listener in server.sockets)
