"""The processes of a replica: gunicorn's arbiter, one HTTP process, and that one's worker.

The arbiter forks the HTTP process, the HTTP process starts the worker, and each child dies with its parent.
Nothing is ever started again: if one of them ends unasked the arbiter exits with code 3, and whoever
supervises the replica decides what comes next.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import zmq
from flask import Flask

from ...common import worker_heartbeat
from ...common.addresses import authority
from ...common.errors import FastDeployError
from ...common.file_limit import connections_of
from ...common.gunicorn_base import Arbiter, BaseApplication, HaltServer, Logger, forget_inherited_sockets
from ...common.metrics_server import MetricsServer
from ...common.process_control import die_with_parent
from ..http_worker import HttpWorker
from ..registration import FAREWELL_SECONDS, Address, Registration
from .app import create_app
from .engine_client import EngineClient
from .options import ServeConfig
from .replica import Replica

_log = logging.getLogger(__name__)

EXIT_FAILED = 3
#: Seconds the worker has to leave its loop.
_WORKER_STOP = 5
#: Seconds for clients to be told that their requests have failed.
_LAST_ANSWERS = 2.0
#: Between what a router has been told and what it does with requests that it has in hand.
_LAST_REQUESTS = 0.1
#: Longer than routers keep idle connections (30 s in ours, 60 s in nginx): the side that has just sent a
#: request must not find that the other has closed.
_KEEPALIVE = 75
#: gunicorn's settings that decide whether and how a request is read. The router checks requests first, so
#: these limits are above its own (request_parser.py) and leave room for the headers that it adds.
HTTP_SETTINGS: dict[str, Any] = {
    # gunicorn's maximum.
    "limit_request_line": 8190,
    "limit_request_fields": 160,
    "limit_request_field_size": 66 << 10,
    # The other parser is an optional package with other limits.
    "http_parser": "python",
    "http_protocols": "h1",
    "http2_cleartext": "off",
    "proxy_protocol": "off",
    # No peer is a trusted proxy: neither scheme nor path prefix of a request comes from its headers.
    "forwarded_allow_ips": "",
    "secure_scheme_headers": {},
    "forwarder_headers": "",
    # A header name with an underscore could pose as another header.
    "header_map": "drop",
    "strip_header_spaces": False,
    "permit_obsolete_folding": False,
    "permit_unconventional_http_method": False,
    "permit_unconventional_http_version": False,
    "casefold_http_method": False,
    # No answer is a file.
    "sendfile": False,
}


def serve(config: ServeConfig, addresses: Sequence[str]) -> None:
    """Run until SIGTERM or SIGINT, and exit the process: 0 then, 3 when the replica has failed.

    Args:
        addresses: all addresses of `config.host`; the replica listens on each.
    """
    _Application(config, addresses).run()


class _Application(BaseApplication):
    def __init__(self, config: ServeConfig, addresses: Sequence[str]) -> None:
        self.config = config
        self.addresses = addresses
        #: Of the HTTP process; None in the arbiter.
        self.parts: _Parts | None = None
        super().__init__()

    def load_config(self) -> None:
        config = self.config
        settings: dict[str, Any] = {
            "bind": [authority(address, config.port) for address in self.addresses],
            "proc_name": f"replica {config.engine.data_parallel_rank}",
            "worker_class": _HttpProcess,
            "workers": 1,
            "threads": config.threads,
            "worker_connections": connections_of(config.threads),
            "keepalive": _KEEPALIVE,
            # The HTTP process is never killed for being busy; the daemon has probes for a hang.
            "timeout": 0,
            # The arbiter waits longer than the HTTP process, which before tells its router and afterwards
            # stops its worker; see load().
            "graceful_timeout": FAREWELL_SECONDS + config.timeout_graceful_shutdown + _WORKER_STOP + 5,
            "control_socket_disable": True,
            "logger_class": _Logger,
            "loglevel": "warning",
            "post_fork": _tie_to_arbiter,
            "worker_exit": _stop,
        }
        for name, value in (HTTP_SETTINGS | settings).items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called in the HTTP process, after the fork."""
        # Ctrl-C reaches the whole process group; the arbiter alone acts on it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # For one that hangs. USR1 is gunicorn's.
        signal.signal(signal.SIGUSR2, _tell_stacks)
        # This process's copy of the settings: from here on it says how long open requests may take.
        self.cfg.set("graceful_timeout", self.config.timeout_graceful_shutdown)
        try:
            self.parts = _Parts(self.config, self.addresses)
        except (FastDeployError, OSError, zmq.ZMQError) as error:
            _log.error("%s", error)
            sys.exit(EXIT_FAILED)
        return create_app(self.parts.replica)

    def run(self) -> None:
        worker_heartbeat.keep_in_memory()
        forget_inherited_sockets()
        _Arbiter(self).run()


class _Parts:
    """What the HTTP process consists of besides its threads for requests."""

    def __init__(self, config: ServeConfig, addresses: Sequence[str]) -> None:
        self.engine = EngineClient(config.engine, config.engine_worker_queue_port, self._fail)
        self.replica = Replica(config, self.engine)
        self.registration: Registration | None = None
        if config.metrics_port is not None:
            # Until the process ends: how the last requests fare is worth knowing, too.
            MetricsServer(addresses, config.metrics_port, self.replica.metrics.render)
        self.engine.start()
        if config.router is not None:
            address = Address(
                tuple(addresses),
                config.port,
                config.metrics_port or config.port,
                self.engine.port,
                config.engine.data_parallel_rank,
            )
            self.registration = Registration(
                config.router, address, self.replica.identity, self.replica.is_healthy
            )
            self.registration.start()

    def close(self) -> None:
        if self.registration is not None:
            self.registration.stop()
        # Requests that are still open now have had their time; they end with an error.
        self.engine.close(_WORKER_STOP)
        self.replica.wait_until_idle(_LAST_ANSWERS)

    def _fail(self, message: str) -> None:
        _log.error("replica stops: %s", message)
        if self.registration is not None and self.registration.is_alive():
            # Requests come as long as it does not know, the more of them the faster they fail.
            self.registration.leave()
        self.replica.wait_until_idle(_LAST_ANSWERS)
        logging.shutdown()
        os._exit(EXIT_FAILED)


class _Arbiter(Arbiter):
    """gunicorn's, with one child that is not replaced."""

    stopping = False

    def stop(self, graceful: bool = True) -> None:
        self.stopping = True
        super().stop(graceful)

    def reap_workers(self) -> None:
        # Also collects orphans, in case this is process 1 of a container.
        while any_child := _wait_for_any_child():
            pid, status = any_child
            worker = self.WORKERS.pop(pid, None)
            if worker is None:
                continue
            worker.tmp.close()
            if not self.stopping:
                code = os.waitstatus_to_exitcode(status)
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise HaltServer(f"the HTTP process pid={pid} has ended: {how}", EXIT_FAILED)

    def handle_int(self) -> None:
        """Ctrl-C is as gentle as SIGTERM; a second one, during the stop, is not."""
        self.handle_term()

    def _unsupported(self) -> None:
        # They would start a second HTTP process, and with it a second worker.
        _log.warning("signal ignored: a replica is not reloaded but started anew")

    handle_hup = handle_ttin = handle_ttou = handle_usr2 = _unsupported


class _HttpProcess(HttpWorker):
    """Before it stops it tells the router, and goes on serving until that knows."""

    is_leaving = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In the loop: a signal may come while this thread holds any lock.
        self.method_queue.defer(self._leave)

    def _leave(self) -> None:
        parts: _Parts | None = self.app.parts
        if parts is None or parts.registration is None:
            self._stop()
        elif not self.is_leaving:
            self.is_leaving = True
            threading.Thread(target=self._tell, args=(parts.registration,), daemon=True).start()

    def _tell(self, registration: Registration) -> None:
        registration.leave()
        time.sleep(_LAST_REQUESTS)
        self.method_queue.defer(self._stop)

    def _stop(self) -> None:
        if self.app.parts is not None:
            self.app.parts.replica.draining = True
        super().handle_exit(signal.SIGTERM, None)


class _Logger(Logger):
    """Sends gunicorn's few words the way of all others."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


def _wait_for_any_child() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _tie_to_arbiter(arbiter: Arbiter, http: HttpWorker) -> None:
    die_with_parent(http.ppid)


def _tell_stacks(number: int, frame: FrameType | None) -> None:
    """Where all threads are, to stderr. They stand still meanwhile; with faulthandler's own handler they do
    not, and a look at stacks that change may be a crash.
    """
    faulthandler.dump_traceback()


def _stop(arbiter: Arbiter, http: HttpWorker) -> None:
    """In the HTTP process, when it has stopped serving."""
    parts: _Parts | None = http.app.parts
    if parts is None:
        return
    # gunicorn's word for "nobody has told it to stop"; what went wrong it has logged.
    unasked = http.alive
    if unasked:
        _log.error("replica stops: the loop that serves connections has failed")
    parts.close()
    # A thread that sends to a client which does not read would keep the interpreter from ending.
    logging.shutdown()
    os._exit(EXIT_FAILED if unasked else 0)
