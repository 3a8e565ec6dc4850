"""The router as a WSGI application: Flask for the control plane, the relay for /v1/."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from flask import Flask, Response, g, jsonify, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException

from . import health
from .answers import error_body
from .board import Board
from .incoming import Environ
from .metrics import Metrics
from .registration import AllowedAddresses, Instance, RegistrationError, parse
from .registry import RegistryFile
from .relay import Limits, Relay
from .settings import Settings
from .upstream import Connections

logger = logging.getLogger(__name__)

_MAX_REGISTRATION = 64 << 10


class Router:
    """All that one router process holds. A WSGI application, once `start` was called, after the fork."""

    def __init__(self, settings: Settings) -> None:
        self.board = Board()
        self.metrics = Metrics(self.board)
        self._allowed = AllowedAddresses(settings.allow_hosts)
        self._registry = RegistryFile(settings.registry_file)
        connections = Connections(settings.request_timeout)
        self._monitor = health.Monitor(self.board, self._registry, connections, settings.health_interval)
        limits = Limits(settings.max_body_bytes, settings.max_in_flight)
        self._relay = Relay(self.board, settings.policy, connections, settings.keys, limits, self.metrics)
        self._control = _control_plane(self)

    def start(self) -> None:
        for instance in self._registry.load(self._allowed):
            self.board.admit(instance, up=False)
        self._monitor.start()

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith("/v1/"):
            return self._relay(environ, start_response)
        return self._control.wsgi_app(environ, start_response)

    def register(self, body: bytes, peer: str) -> Instance:
        """A registration or a heartbeat, which are the same thing.

        Raises:
            RegistrationError: it is wrong, not allowed, or the instance is not healthy.
        """
        # Both ends are looked at: someone elsewhere must not point the router at services of this machine.
        self._check_allowed("the sender", peer)
        instance = parse(body)
        self._check_allowed("host_ip", instance.host)
        seat = self.board.seat_of(instance)
        # One that is up is looked at all the time anyway: its heartbeat need not wait for another look.
        if seat is None or not seat.up:
            asked_at = time.monotonic()
            problem = health.check(instance)
            if problem is not None:
                if seat is not None:
                    self.board.heard(seat)
                raise RegistrationError(f"{instance.url} service is not healthy", 503)
            if seat is not None:
                self.board.healthy(seat, asked_at)
        if self.board.admit(instance):
            self._registry.save(self.board)
        return instance

    def _check_allowed(self, what: str, address: str) -> None:
        if address not in self._allowed:
            raise RegistrationError(
                f"{what} {address} is not on this machine; start fd-router with --allow-host {address} "
                "(or a network such as 10.0.0.0/24) to accept it",
                403,
            )


def _control_plane(router: Router) -> Flask:
    app = Flask("fd-router", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = _MAX_REGISTRATION
    app.json.sort_keys = False  # type: ignore[attr-defined]

    @app.before_request
    def start_clock() -> None:
        g.began = time.monotonic()

    @app.after_request
    def count(response: Response) -> Response:
        seconds = time.monotonic() - g.began
        router.metrics.answered(request.method, request.path, response.status_code, seconds)
        return response

    @app.post("/register")
    def register() -> tuple[Response, int]:
        try:
            router.register(_body(), request.remote_addr or "")
        except RegistrationError as error:
            # 503 is told to every replica that is still loading, every second.
            if error.status < 500:
                logger.warning("registration by %s refused: %r", request.remote_addr, str(error))
            return jsonify(code=error.status, msg=str(error)), error.status
        return jsonify(code=200, msg="Register success"), 200

    @app.get("/registered")
    def registered() -> Response:
        rows = router.board.status()
        shown: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for row in rows:
            shown[row.up].append({**row.instance.wire(), "in_flight": row.in_flight})
        return jsonify(code=200, msg="success", mixed=shown[True], prefill=[], decode=[], down=shown[False])

    @app.get("/registered_number")
    def registered_number() -> Response:
        return jsonify(mixed=_count_up(router.board), prefill=0, decode=0)

    @app.get("/health")
    def is_alive() -> Response:
        return jsonify(status="ok", replicas_up=_count_up(router.board))

    @app.get("/health_generate")
    def can_generate() -> tuple[Response, int]:
        if _count_up(router.board):
            return jsonify(code=200, msg="Health check complete"), 200
        return jsonify(code=503, msg="no healthy instance"), 503

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(router.metrics.exposition(), mimetype="text/plain; version=0.0.4")

    @app.errorhandler(HTTPException)
    def refuse(fault: HTTPException) -> Response:
        status = fault.code or 500
        if status == 500:
            return Response('{"code":500,"msg":"Internal server error"}', 500, mimetype="application/json")
        message = f"{request.method} {request.path}: {fault.name.lower()}"
        response = Response(error_body(status, message, fault.name.lower().replace(" ", "_")), status)
        response.mimetype = "application/json"
        if "Allow" in (headers := dict(fault.get_headers())):
            response.headers["Allow"] = headers["Allow"]
        return response

    return app


def _body() -> bytes:
    try:
        return request.get_data()
    except (OSError, ParseException) as error:
        raise RegistrationError(f"the request body cannot be read: {error}") from None


def _count_up(board: Board) -> int:
    return sum(row.up for row in board.status())
