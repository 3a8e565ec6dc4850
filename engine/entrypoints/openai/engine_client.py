"""The API process's side of the socket to its worker.

One thread owns the ZeroMQ socket. Other threads queue messages and wake it; it passes each output to its
`TokenStream`. A pidfd reports the worker's death.
"""

from __future__ import annotations

import enum
import hmac
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import msgspec
import zmq

from ...common.errors import EngineLost, FastDeployError, ReplicaUnavailable
from ...common.foreign_text import printable
from ...common.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    Failed,
    FromWorker,
    Hello,
    LoadProgress,
    Ready,
    Shutdown,
    Stats,
    StepOutputs,
    TokenOutput,
    ToWorker,
)
from ...common.request import FinishReason
from ...config import EngineConfig
from .worker_process import WORKER_COMMAND, WorkerProcess

_log = logging.getLogger(__name__)

#: Milliseconds to wait for the last messages of a worker that has exited, or that was killed.
_DRAIN_MS, _KILLED_DRAIN_MS = 200, 10


class EngineState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    state: EngineState
    #: Loading progress, 0..1.
    progress: float = 0.0
    stage: str = "starting"
    #: Reason of state FAILED.
    message: str = ""


@dataclass(frozen=True, slots=True)
class ProgressCounters:
    """Progress of the worker; two samples tell a busy worker from a hung one."""

    pid: int
    #: Steps for its own requests since the start; a long prompt takes several.
    steps: int
    #: Unfinished sequences.
    requests: int
    #: Seconds since its last output, or since it got work if that was later; 0 while it has no work.
    silent: float


class ClientGone(FastDeployError):
    """The client of this stream has disconnected."""


class EngineClient:
    """Starts the worker and exchanges messages with it.

    Args:
        port: where the worker connects; 0 for any free port.
        on_failure: called once with a one-line reason when the worker dies, cannot start or sends an
            unreadable message; in the I/O thread, after all open streams have got an error.
    """

    def __init__(
        self,
        config: EngineConfig,
        port: int,
        on_failure: Callable[[str], object],
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._config = config
        self._command = command
        self._on_failure = on_failure
        self._token = secrets.token_hex(32)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        # No limit: at its limit a ROUTER drops messages silently. The admission of requests bounds the queue.
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(f"tcp://127.0.0.1:{port}")
        #: The bound port.
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

        self._outgoing: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._identity: bytes | None = None
        self._lock = threading.Lock()
        self._streams: dict[str, TokenStream] = {}
        #: Time since which output of the worker is expected; None if none is.
        self._waiting_since: float | None = None
        #: The latest statistics; None before the first step.
        self.stats: Stats | None = None
        #: Sizes of the cache; None before the worker is ready.
        self.ready: Ready | None = None
        self.status = EngineStatus(EngineState.LOADING)

        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)

    def start(self) -> None:
        """Start the worker. Call this in the main thread: the worker dies with the thread that starts it."""
        endpoint = f"tcp://127.0.0.1:{self.port}"
        self._worker = WorkerProcess(self._config, endpoint, self._token, self._command)
        self._thread.start()

    @property
    def worker_pid(self) -> int:
        return self._worker.pid

    @property
    def progress(self) -> ProgressCounters:
        waiting_since = self._waiting_since
        silent = 0.0 if waiting_since is None else time.monotonic() - waiting_since
        steps = 0 if self.stats is None else self.stats.steps_total
        return ProgressCounters(self._worker.pid, steps, len(self._streams), silent)

    def require_ready(self) -> None:
        """Raise ReplicaUnavailable with the reason unless the engine is ready."""
        status = self.status
        if status.state is not EngineState.READY:
            raise ReplicaUnavailable(_unavailable_message(status))

    def generate(
        self, requests: list[AddRequest], wait_seconds: Callable[[], float] | None = None
    ) -> TokenStream:
        """Send the sequences of one client request. Leave (``with``) or close the returned stream.

        Args:
            wait_seconds: returns how long the stream waits for an output before it yields None.

        Raises:
            ReplicaUnavailable: the engine is loading, has failed or is being stopped.
        """
        stream = TokenStream(self, [request.request_id for request in requests], wait_seconds)
        with self._lock:
            # Under the lock: a stream added after a failure would never end.
            self.require_ready()
            for request in requests:
                assert request.request_id not in self._streams, "request ids are unique"
                self._streams[request.request_id] = stream
            if self._waiting_since is None and requests:
                self._waiting_since = time.monotonic()
        for request in requests:
            self._send(request)
        return stream

    def close(self, timeout: float) -> None:
        """Stop the worker; kill it if it has not stopped within `timeout` seconds. 0: kill it at once."""
        self._end_streams(replace(self.status, state=EngineState.STOPPED))
        self._send(Shutdown())
        self._thread.join(timeout)
        if self._thread.is_alive():
            if timeout:
                _log.warning(
                    "worker pid=%d did not stop within %g s and is killed", self._worker.pid, timeout
                )
            self._worker.kill()
            self._thread.join()

    def _abort(self, request_ids: list[str]) -> None:
        with self._lock:
            known = [request_id for request_id in request_ids if self._streams.pop(request_id, None)]
        if known:
            self._send(AbortRequests(known))

    def _send(self, message: ToWorker) -> None:
        self._outgoing.put(message)
        os.eventfd_write(self._wake, 1)

    # ---- the I/O thread

    def _run(self) -> None:
        try:
            self._serve_socket()
        except Exception as fault:
            # Without this thread all open requests would wait forever, so the replica exits.
            _log.exception("the I/O thread for the worker failed")
            self._fail(f"the I/O thread for worker pid={self._worker.pid} failed ({fault!r})")
        self._worker_ended()

    def _serve_socket(self) -> None:
        """Serve the worker's socket until the worker has ended."""
        poller = zmq.Poller()
        for source in (self._socket, self._wake, self._worker.pidfd):
            poller.register(source, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._socket in ready:
                self._receive()
            if self._wake in ready:
                os.eventfd_read(self._wake)
                self._send_queued()
            if self._worker.pidfd in ready:
                # Its last messages may still be in ZeroMQ's thread. A killed worker sent none, and its
                # requests should be retried elsewhere soon.
                timeout_ms = _KILLED_DRAIN_MS if self._worker.was_killed() else _DRAIN_MS
                while self._socket.poll(timeout_ms):
                    self._receive()
                return

    def _send_queued(self) -> None:
        while not self._outgoing.empty():
            message = self._outgoing.get()
            if self._identity is not None:
                self._send_now(self._identity, message)
            elif isinstance(message, Shutdown):
                # It has not sent Hello, so it cannot be asked to stop.
                self._worker.kill()

    def _send_now(self, identity: bytes, message: ToWorker) -> None:
        try:
            data = _encoder.encode(message)
        except Exception as fault:
            if not isinstance(message, AddRequest):
                raise
            # For example a number too large for a message: only this request fails.
            _log.exception("request=%s cannot be sent to the worker", message.ids)
            why = f"the request cannot be sent to the engine ({type(fault).__name__})"
            self._deliver(TokenOutput(message.request_id, [], FinishReason.ERROR, message=why))
        else:
            self._socket.send_multipart([identity, data])

    def _receive(self) -> None:
        identity, *frames = self._socket.recv_multipart()
        try:
            message = _decoder.decode(b"".join(frames))
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            if identity == self._identity:
                # A lost message would be a gap in some client's text.
                self._fail(f"worker pid={self._worker.pid} sent an unreadable message ({printable(error)})")
            return
        if identity == self._identity:
            self._dispatch(message)
        elif self._identity is None and isinstance(message, Hello):
            self._authenticate(identity, message)

    def _authenticate(self, identity: bytes, hello: Hello) -> None:
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            _log.warning("ignored a connection with a wrong token that claims to be worker pid=%d", hello.pid)
        elif hello.version != PROTOCOL_VERSION:
            self._fail(
                f"the worker speaks protocol {hello.version}, the API process {PROTOCOL_VERSION}; "
                "the installation has changed: restart the replica"
            )
        else:
            self._identity = identity

    def _dispatch(self, message: FromWorker) -> None:
        match message:
            case StepOutputs():
                self.stats = message.stats
                for output in message.outputs:
                    self._deliver(output)
                with self._lock:
                    self._waiting_since = time.monotonic() if self._streams else None
            case LoadProgress():
                if self.status.state is EngineState.LOADING:
                    self.status = replace(self.status, progress=message.fraction, stage=message.stage)
            case Ready():
                if self.status.state is EngineState.LOADING:
                    self.ready = message
                    self.status = EngineStatus(EngineState.READY, 1.0, "ready")
                    _log.info("ready: worker pid=%d, %d blocks", self._worker.pid, message.num_blocks)
            case Failed():
                self._fail(message.message)

    def _deliver(self, output: TokenOutput) -> None:
        with self._lock:
            if output.finish_reason is None:
                stream = self._streams.get(output.request_id)
            else:
                stream = self._streams.pop(output.request_id, None)
        if stream is not None:
            stream._outputs.put(output)

    def _fail(self, message: str) -> None:
        """Kill the worker; its exit then reports `message`."""
        if self.status.state is not EngineState.STOPPED:
            self.status = replace(self.status, state=EngineState.FAILED, message=message)
        self._worker.kill()

    def _worker_ended(self) -> None:
        how = self._worker.end()
        self._socket.close()
        if self.status.state is EngineState.STOPPED:
            _log.info("worker pid=%d %s", self._worker.pid, how)
            return
        message = self.status.message or f"worker pid={self._worker.pid} {how}"
        self._end_streams(replace(self.status, state=EngineState.FAILED, message=message))
        self._on_failure(message)

    def _end_streams(self, status: EngineStatus) -> None:
        with self._lock:
            self.status = status
            streams = set(self._streams.values())
            self._streams.clear()
        for stream in streams:
            lost = EngineLost if status.state is EngineState.FAILED else ReplicaUnavailable
            stream._outputs.put(lost(_unavailable_message(status)))


class TokenStream:
    """Outputs of the sequences of one client request, in the order in which they are drawn.

    Iteration ends when all sequences have ended. It raises `ReplicaUnavailable` when the engine fails and
    `ClientGone` after `cancel()`. It yields None after `wait_seconds()` without an output.
    """

    def __init__(
        self, engine: EngineClient, request_ids: list[str], wait_seconds: Callable[[], float] | None
    ) -> None:
        self._engine = engine
        self._wait_seconds = wait_seconds
        self._open = dict.fromkeys(request_ids)
        self._outputs: queue.SimpleQueue[TokenOutput | FastDeployError] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[TokenOutput | None]:
        wait_seconds = self._wait_seconds
        while self._open:
            try:
                event = self._outputs.get(timeout=None if wait_seconds is None else wait_seconds())
            except queue.Empty:
                yield None
                continue
            if isinstance(event, FastDeployError):
                raise event
            # Drop outputs of a sequence that was stopped in the meantime.
            if event.request_id in self._open:
                if event.finish_reason is not None:
                    del self._open[event.request_id]
                yield event

    def stop(self, request_id: str) -> None:
        """Abort a sequence whose text is complete. For the iterating thread only."""
        if request_id in self._open:
            del self._open[request_id]
            self._engine._abort([request_id])

    def cancel(self) -> None:
        """Abort all sequences and wake the iterating thread. For any thread."""
        self._engine._abort(list(self._open))
        self._outputs.put(ClientGone("the client has closed its connection"))

    def end(self) -> None:
        """Abort all sequences; each ends with the finish reason ABORT. For any thread."""
        request_ids = list(self._open)
        self._engine._abort(request_ids)
        for request_id in request_ids:
            self._outputs.put(TokenOutput(request_id, [], FinishReason.ABORT))

    def close(self) -> None:
        """Abort unfinished sequences. For the iterating thread only."""
        self._engine._abort(list(self._open))
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(FromWorker)


def _unavailable_message(status: EngineStatus) -> str:
    match status.state:
        case EngineState.LOADING:
            return f"the model is loading ({status.progress:.0%}, {status.stage}); try again later"
        case EngineState.STOPPED:
            return "the server is shutting down"
        case _:
            return "the engine of this replica has stopped working"
