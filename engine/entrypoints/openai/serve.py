"""The processes of a replica: gunicorn's arbiter, one HTTP process, and the worker.

The arbiter forks the HTTP process, the HTTP process starts the worker, and each child dies with its parent.
No process is restarted: if one exits unexpectedly, the arbiter exits with code 3, and the supervisor of the
replica decides what to do.
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

import msgspec
import zmq
from flask import Flask

from ...common import worker_heartbeat
from ...common.addresses import authority
from ...common.api_paths import CONFIG_PATH
from ...common.errors import FastDeployError
from ...common.file_limit import connections_of
from ...common.gunicorn_base import Arbiter, BaseApplication, HaltServer, Logger, forget_inherited_sockets
from ...common.metrics_server import MetricsServer
from ...common.process_control import die_with_parent
from ..http_worker import HttpWorker
from ..registration import DEREGISTER_SECONDS, Address, Registration
from .app import create_app
from .engine_client import EngineClient
from .options import ServeConfig
from .served_model import ServedModel
from .side_endpoints import config_info

_log = logging.getLogger(__name__)

EXIT_FAILED = 3
#: Seconds for the worker to leave its loop before it is killed.
_WORKER_STOP_SECONDS = 5
#: Seconds to send error responses to open requests.
_FINAL_RESPONSE_SECONDS = 2.0
#: Seconds after deregistration in which the router may still forward requests.
_DEREGISTER_SETTLE_SECONDS = 0.1
#: Longer than routers keep idle connections (30 s in ours, 60 s in nginx), so that a router never sends a
#: request on a connection that the replica is closing.
_KEEPALIVE_SECONDS = 75
#: gunicorn's settings for parsing requests. The router checks requests first, so these limits are above its
#: own (request_parser.py) and leave room for the headers that it adds.
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
    # No peer is a trusted proxy: scheme and path prefix of a request never come from its headers.
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
    # No response is a file.
    "sendfile": False,
}


def serve(config: ServeConfig, addresses: Sequence[str]) -> None:
    """Run until SIGTERM or SIGINT, then exit the process with 0; exit with 3 if the replica has failed.

    Args:
        addresses: all addresses of `config.host`; the replica listens on each.
    """
    _Application(config, addresses).run()


class _Application(BaseApplication):
    def __init__(self, config: ServeConfig, addresses: Sequence[str]) -> None:
        self.config = config
        self.addresses = addresses
        #: None in the arbiter.
        self.parts: _ReplicaParts | None = None
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
            "keepalive": _KEEPALIVE_SECONDS,
            # gunicorn must not kill a busy HTTP process; the daemon detects hangs.
            "timeout": 0,
            # The arbiter waits longer than the HTTP process, which also deregisters before and stops its
            # worker afterwards; see load().
            "graceful_timeout": DEREGISTER_SECONDS
            + config.timeout_graceful_shutdown
            + _WORKER_STOP_SECONDS
            + 5,
            "control_socket_disable": True,
            "logger_class": _Logger,
            "loglevel": "warning",
            "post_fork": _die_with_arbiter,
            "worker_exit": _stop,
        }
        for name, value in (HTTP_SETTINGS | settings).items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Return the application. gunicorn calls this in the HTTP process, after the fork."""
        # Ctrl-C reaches the whole process group; only the arbiter handles it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # For hung processes. gunicorn uses SIGUSR1.
        signal.signal(signal.SIGUSR2, _dump_stacks)
        # In this process's copy of the settings: the time for open requests.
        self.cfg.set("graceful_timeout", self.config.timeout_graceful_shutdown)
        try:
            self.parts = _ReplicaParts(self.config, self.addresses)
        except (FastDeployError, OSError, zmq.ZMQError) as error:
            _log.error("%s", error)
            sys.exit(EXIT_FAILED)
        return create_app(self.parts.served)

    def run(self) -> None:
        worker_heartbeat.keep_in_memory()
        forget_inherited_sockets()
        _Arbiter(self).run()


class _ReplicaParts:
    """Engine client, model, metrics port and registration of the HTTP process."""

    def __init__(self, config: ServeConfig, addresses: Sequence[str]) -> None:
        self.engine = EngineClient(config.engine, config.engine_worker_queue_port, self._fail)
        self.served = ServedModel(config, self.engine)
        self.registration: Registration | None = None
        if config.metrics_port is not None:
            # Serves until the process exits, so that the last requests are counted too.
            MetricsServer(
                addresses,
                config.metrics_port,
                self.served.metrics.render,
                {CONFIG_PATH.encode(): lambda: msgspec.json.encode(config_info(config))},
            )
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
                config.router,
                address,
                self.served.identity,
                self.served.is_healthy,
                lambda: self.engine.ready.numeric_version if self.engine.ready else "",
            )
            self.registration.start()

    def close(self) -> None:
        if self.registration is not None:
            self.registration.stop()
        # The grace period is over: requests that are still open end with an error.
        self.engine.close(_WORKER_STOP_SECONDS)
        self._finish()

    def _fail(self, message: str) -> None:
        _log.error("replica stops: %s", message)
        if self.registration is not None and self.registration.is_alive():
            # The router sends requests until it knows, and more of them the faster they fail.
            self.registration.leave()
        self._finish()
        logging.shutdown()
        os._exit(EXIT_FAILED)

    def _finish(self) -> None:
        """Let the last responses and spans be sent."""
        self.served.wait_until_idle(_FINAL_RESPONSE_SECONDS)
        if self.served.tracing is not None:
            self.served.tracing.close()


class _Arbiter(Arbiter):
    """gunicorn's arbiter with one child, which is never replaced."""

    stopping = False

    def stop(self, graceful: bool = True) -> None:
        self.stopping = True
        super().stop(graceful)

    def reap_workers(self) -> None:
        # Any child: in a container this may be process 1, which must reap orphans.
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
        """Stop gracefully, as on SIGTERM. A second SIGINT during the stop is immediate."""
        self.handle_term()

    def _unsupported(self) -> None:
        # These signals would start a second HTTP process, and so a second worker.
        _log.warning("signal ignored: restart the replica instead of reloading it")

    handle_hup = handle_ttin = handle_ttou = handle_usr2 = _unsupported


class _HttpProcess(HttpWorker):
    """gunicorn worker that deregisters before it stops, and serves requests until then."""

    is_leaving = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Deferred to the loop: the signal may have interrupted this thread while it holds a lock.
        self.method_queue.defer(self._leave)

    def _leave(self) -> None:
        parts: _ReplicaParts | None = self.app.parts
        if parts is None or parts.registration is None:
            self._stop()
        elif not self.is_leaving:
            self.is_leaving = True
            threading.Thread(target=self._deregister, args=(parts.registration,), daemon=True).start()

    def _deregister(self, registration: Registration) -> None:
        registration.leave()
        time.sleep(_DEREGISTER_SETTLE_SECONDS)
        self.method_queue.defer(self._stop)

    def _stop(self) -> None:
        if self.app.parts is not None:
            self.app.parts.served.draining = True
        super().handle_exit(signal.SIGTERM, None)


class _Logger(Logger):
    """gunicorn's logger, through this package's handlers."""

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


def _die_with_arbiter(arbiter: Arbiter, http: HttpWorker) -> None:
    die_with_parent(http.ppid)


def _dump_stacks(number: int, frame: FrameType | None) -> None:
    """Write the stacks of all threads to stderr.

    A Python handler holds the GIL, so the stacks cannot change. With faulthandler's own handler they can, and
    walking a stack that changes may crash.
    """
    faulthandler.dump_traceback()


def _stop(arbiter: Arbiter, http: HttpWorker) -> None:
    """Stop the worker and exit. gunicorn calls this in the HTTP process when it has stopped serving."""
    parts: _ReplicaParts | None = http.app.parts
    if parts is None:
        return
    # `alive` means that no stop was requested; gunicorn has logged the error.
    failed = http.alive
    if failed:
        _log.error("replica stops: the loop that serves connections has failed")
    parts.close()
    # os._exit: a thread that sends to a client which does not read would block a normal exit.
    logging.shutdown()
    os._exit(EXIT_FAILED if failed else 0)
