"""The router's control plane, a Flask application: registrations, health, metrics and admin commands."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec
from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from .... import __version__
from ....common.addresses import is_loopback
from ....common.api_paths import ABORT_PATH
from ....common.unserved import reason_of
from ..addresses import AllowedAddresses
from ..board.board import Board, Ending, Status
from ..config.settings import Settings
from ..http import refusals
from ..http.responses import error_body
from ..instance import Instance, RegistrationError, ReplicaHandle
from ..metrics.counter_memory import CounterMemory
from ..metrics.metrics import Metrics
from ..page.routes import routes as page_routes
from . import health
from .abort import abort_everywhere
from .registration import parse, parse_deregistration
from .registry import RegistryFile
from .reload_status import ReloadStatus

logger = logging.getLogger(__name__)

_MAX_REGISTRATION_BYTES = 64 << 10
#: Maximum characters of a path in an error message.
_MAX_PATH = 200
#: Maximum characters of a request's id.
_MAX_ID = 128
_COMMANDS: dict[str, Callable[[Board, ReplicaHandle], bool]] = {
    "drain": Board.drain,
    "undrain": Board.undrain,
    "remove": Board.remove,
}


class _EndingReport(msgspec.Struct, forbid_unknown_fields=True):
    """Report of fd-dp on a replica that has ended."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    #: Instance id with which it registered.
    instance: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    from_outside: bool


class ControlPlane:
    """Control plane of one worker: a WSGI application, ready after `start`."""

    def __init__(
        self, settings: Settings, board: Board, counters: CounterMemory, reloads: ReloadStatus
    ) -> None:
        self.settings = settings
        self.board = board
        self.reloads = reloads
        self.metrics = Metrics(board, counters)
        self.registry = RegistryFile(settings.registry_file)
        self._allowed = AllowedAddresses(settings.allow_hosts)
        self._monitor = health.Monitor(board, self.registry, settings.policy, settings.health_interval)
        self._control = _control_plane(self)

    def start(self) -> None:
        """Open the worker's counters and start its threads. Call this after the fork."""
        self.board.open_counters()
        self._monitor.start()
        if self.settings.redis is not None:
            # An optional package, and slow to import.
            from .redis_board import RedisBoard

            RedisBoard(self.board, self.registry, self._allowed, self.settings.redis).start()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return self._control.wsgi_app(environ, start_response)

    def register(self, body: bytes, peer: str, authorization: str) -> Instance:
        """Register an instance. A heartbeat is a repeated registration.

        Raises:
            RegistrationError: the registration is invalid or not allowed, or the instance is not healthy.
        """
        self._check_sender(peer, authorization)
        instance = parse(body)
        self._check_allowed("host_ip", instance.host)
        if instance.port == self.settings.port and self._allowed.is_own(instance.host):
            raise RegistrationError(f"{instance.url} is the router itself")
        handle = self.board.handle_of(instance.url)
        is_new = handle is None or handle.instance.instance != instance.instance
        # A replica that is up is checked regularly anyway, so its heartbeat need not wait for a check.
        if handle is None or is_new or not self._is_up(handle):
            asked_at = time.monotonic()
            problem = health.check(instance)
            if problem is not None:
                if handle is not None:
                    self.board.record_heartbeat(handle)
                raise RegistrationError(f"{instance.url} service is not healthy", 503)
            if handle is not None and not is_new:
                self.board.healthy(handle, asked_at)
        if self.board.admit(instance):
            self.registry.save(self.board)
        return instance

    def deregister(self, body: bytes, peer: str, authorization: str) -> bool:
        """Deregister a replica that is about to end, so that it gets no new requests. False if unknown."""
        self._check_sender(peer, authorization)
        url, instance = parse_deregistration(body)
        if not self.board.deregister(url, instance):
            return False
        self.registry.save(self.board)
        return True

    def command(self, command: str, name: str) -> Status | None:
        """Drain, undrain or remove a replica; return its status then, None if there is none of that name."""
        row = next(
            (row for row in self.board.status() if name in (row.instance.name, row.instance.authority)), None
        )
        if row is None or not _COMMANDS[command](self.board, row.handle):
            return None
        self.registry.save(self.board)
        return next((each for each in self.board.status() if each.handle == row.handle), row)

    def is_admin(self, peer: str, authorization: str) -> bool:
        """Return True on the unix socket, which has permissions, or for an admin key from this machine."""
        if not peer:
            return True
        keys = self.settings.admin_keys
        return bool(keys) and is_loopback(peer) and keys.allow(authorization)

    def _is_up(self, handle: ReplicaHandle) -> bool:
        return any(row.up for row in self.board.status() if row.handle == handle)

    def _check_sender(self, peer: str, authorization: str) -> None:
        """Check the sender too: another machine must not direct the router to services of this one."""
        if not peer or self._allowed.is_own(peer):
            return
        self._check_allowed("the sender", peer)
        keys = self.settings.register_keys
        if not keys:
            raise RegistrationError(
                "replicas on other machines need a key, and none is set: start fd-router with "
                "--register-keys-file FILE, and the replicas with one of its keys in FD_ROUTER_REGISTER_KEY",
                403,
            )
        if not keys.allow(authorization):
            raise RegistrationError("a valid key is needed: Authorization: Bearer KEY", 401)

    def _check_allowed(self, what: str, address: str) -> None:
        if address not in self._allowed:
            raise RegistrationError(
                f"{what} {address} is not on this machine; start fd-router with --allow-host {address} "
                "(or a network such as 10.0.0.0/24) to accept it",
                403,
            )


def _control_plane(router: ControlPlane) -> Flask:
    app = Flask("fd-router", static_folder=None)
    # FLASK_DEBUG must not enable it.
    app.debug = False
    app.config["MAX_CONTENT_LENGTH"] = _MAX_REGISTRATION_BYTES
    # No redirects: paths are canonical already (http/request.py).
    app.url_map.merge_slashes = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    if router.settings.page:
        app.register_blueprint(page_routes(router.board, router.settings))

    @app.post("/register")
    def register() -> tuple[Response, int]:
        try:
            router.register(request.get_data(), request.remote_addr or "", _authorization())
        except RegistrationError as error:
            # Each replica that is still loading gets a 503 every second.
            if error.status < 500:
                logger.warning("registration by %s refused: %r", request.remote_addr, str(error))
            return jsonify(code=error.status, msg=str(error)), error.status
        return jsonify(code=200, msg="Register success"), 200

    @app.post("/deregister")
    def deregister() -> tuple[Response, int]:
        try:
            known = router.deregister(request.get_data(), request.remote_addr or "", _authorization())
        except RegistrationError as error:
            logger.warning("deregistration by %s refused: %r", request.remote_addr, str(error))
            return jsonify(code=error.status, msg=str(error)), error.status
        if not known:
            return jsonify(code=404, msg="no such instance is registered"), 404
        return jsonify(code=200, msg="Deregister success"), 200

    @app.post("/admin/replicas/<path:name>/<any(drain, undrain, remove):command>")
    def command(name: str, command: str) -> tuple[Response, int]:
        if not router.is_admin(request.remote_addr or "", _authorization()):
            message = "/admin needs --admin-socket, or a key of --admin-keys-file from this machine"
            return jsonify(code=403, msg=message), 403
        row = router.command(command, name)
        if row is None:
            names = ", ".join(row.instance.name for row in router.board.status()) or "none"
            return jsonify(code=404, msg=f"no replica {name!r}; there are: {names}"), 404
        return jsonify(code=200, msg=f"{command} {row.instance.name}", replica=_shown(row)), 200

    @app.post("/admin/endings")
    def ending() -> tuple[Response, int]:
        if not router.is_admin(request.remote_addr or "", _authorization()):
            return jsonify(code=403, msg="endings are reported by fd-dp over --admin-socket"), 403
        try:
            report = msgspec.json.decode(request.get_data(), type=_EndingReport)
        except msgspec.MsgspecError as error:
            return jsonify(code=400, msg=str(error)), 400
        ending = Ending.FROM_OUTSIDE if report.from_outside else Ending.ITS_OWN
        router.board.record_ending(report.url, report.instance, ending)
        return jsonify(code=200, msg="noted"), 200

    @app.post(ABORT_PATH)
    def abort() -> Response:
        request.max_content_length = router.settings.max_body_bytes
        keys = router.settings.keys
        if keys and not keys.allow(_authorization()):
            answer = refusals.no_key()
        else:
            identity = request.headers.get("X-Request-Id", "")[:_MAX_ID] or uuid.uuid4().hex
            replicas = router.board.status()
            answer = abort_everywhere(replicas, request.get_data(), _authorization(), identity)
        return Response(answer.body, answer.status, dict(answer.headers))

    @app.get("/registered")
    def registered() -> Response:
        shown: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for row in router.board.status():
            shown[row.up].append(_shown(row))
        return jsonify(code=200, msg="success", mixed=shown[True], prefill=[], decode=[], down=shown[False])

    @app.get("/registered_number")
    def registered_number() -> Response:
        return jsonify(mixed=_count_up(router.board), prefill=0, decode=0)

    @app.get("/health")
    @app.route("/ping", methods=["GET", "POST"])
    def is_alive() -> Response:
        return jsonify(
            status="ok",
            replicas_up=_count_up(router.board),
            flags=router.settings.flags,
            reload=router.reloads.wire(),
        )

    @app.get("/health_generate")
    def can_generate() -> tuple[Response, int]:
        if _count_up(router.board):
            return jsonify(code=200, msg="Health check complete"), 200
        return jsonify(code=503, msg="no healthy instance"), 503

    @app.get("/version")
    def version() -> Response:
        return jsonify(version=__version__)

    @app.get("/load")
    def load() -> Response:
        in_flight = sum(row.in_flight + row.in_flight_elsewhere for row in router.board.status())
        return jsonify(server_load=in_flight, max_concurrency=router.settings.max_in_flight)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(router.metrics.exposition(), mimetype="text/plain; version=0.0.4")

    @app.errorhandler(HTTPException)
    def refuse(fault: HTTPException) -> Response:
        status = fault.code or 500
        if status == 500:
            return Response('{"code":500,"msg":"Internal server error"}', 500, mimetype="application/json")
        # The path as it was sent: Werkzeug merges slashes.
        path = request.environ["RAW_URI"].partition("?")[0][:_MAX_PATH]
        message = f"{request.method} {path}: {fault.name.lower()}"
        if status == 404 and (reason := reason_of(request.path)):
            message = f"{request.method} {path} is not served: {reason}"
        response = Response(error_body(status, message, fault.name.lower().replace(" ", "_")), status)
        response.mimetype = "application/json"
        if "Allow" in (headers := dict(fault.get_headers())):
            response.headers["Allow"] = headers["Allow"]
        return response

    return app


def _authorization() -> str:
    return request.headers.get("Authorization", "")


def _shown(row: Status) -> dict[str, Any]:
    return {
        **row.instance.wire(),
        "state": row.state.name.lower(),
        "draining": row.draining,
        "leaving": row.leaving,
        "reserved": row.reserved,
        "in_flight": row.in_flight,
        "in_flight_elsewhere": row.in_flight_elsewhere,
        "weight": round(row.weight, 3),
    }


def _count_up(board: Board) -> int:
    return sum(row.up and not row.draining and not row.leaving for row in board.status())
