"""The API process's side of the socket to its worker.

One thread owns the ZeroMQ socket. Everybody else puts messages into a queue and wakes that thread; what
comes back is handed to the `Generation` it belongs to. The worker's death is learnt from the kernel.
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

#: Milliseconds for what a dead worker has said to come through: one that has ended by itself, or was killed.
_LAST_WORDS, _HASTE = 200, 10


class State(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    state: State
    #: Of loading, 0..1.
    progress: float = 0.0
    stage: str = "starting"
    #: Why, in state FAILED.
    message: str = ""


@dataclass(frozen=True, slots=True)
class Pulse:
    """By which one who asks twice can tell a worker that is busy from one that hangs."""

    pid: int
    #: That it has computed for its own requests, since it was started; a long prompt is many.
    steps: int
    #: Sequences that it has been given and has not finished.
    requests: int
    #: Seconds since it has last said anything, or since it was given something to do, if that was later; 0
    #: while it has nothing to do.
    silent: float


class ClientGone(FastDeployError):
    """The client of this generation has left."""


class EngineClient:
    """Starts the worker and talks to it.

    `port` is where the worker is going to connect, 0 for any free one. `on_failure` is called once, in the
    I/O thread and after every open generation has been given an error, with one line for a person: the
    worker has died, cannot start, or speaks nonsense.
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
        # No limit: at its limit a ROUTER drops messages silently. What is queued is bounded by the
        # requests that are let in.
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(f"tcp://127.0.0.1:{port}")
        #: The one that was asked for, or the one the kernel chose in place of 0.
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

        self._outgoing: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._identity: bytes | None = None
        self._lock = threading.Lock()
        self._generations: dict[str, Generation] = {}
        #: Since when the worker owes a word; None if it does not.
        self._owes_since: float | None = None
        #: The latest statistics; None before the first step.
        self.stats: Stats | None = None
        #: Sizes of the cache; None before the worker is ready.
        self.ready: Ready | None = None
        self.status = EngineStatus(State.LOADING)

        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)

    def start(self) -> None:
        """Call it in the main thread: the worker dies with the thread that starts it."""
        endpoint = f"tcp://127.0.0.1:{self.port}"
        self._worker = WorkerProcess(self._config, endpoint, self._token, self._command)
        self._thread.start()

    @property
    def worker_pid(self) -> int:
        return self._worker.pid

    @property
    def pulse(self) -> Pulse:
        owes_since = self._owes_since
        silent = 0.0 if owes_since is None else time.monotonic() - owes_since
        steps = 0 if self.stats is None else self.stats.steps_total
        return Pulse(self._worker.pid, steps, len(self._generations), silent)

    def require_ready(self) -> None:
        """Raises ReplicaUnavailable, saying why, unless `generate` would be accepted now."""
        status = self.status
        if status.state is not State.READY:
            raise ReplicaUnavailable(_unavailable(status))

    def generate(self, requests: list[AddRequest], patience: Callable[[], float] | None = None) -> Generation:
        """Sends the sequences of one client request; leave (``with``) or close what is returned.

        Args:
            patience: how long, in seconds, to wait for tokens before None is given out in their place.

        Raises:
            ReplicaUnavailable: the engine is loading, has failed or is being stopped.
        """
        generation = Generation(self, [request.request_id for request in requests], patience)
        with self._lock:
            # Under the lock: after a failure nobody would come to end this generation.
            self.require_ready()
            for request in requests:
                assert request.request_id not in self._generations, "request ids are unique"
                self._generations[request.request_id] = generation
            if self._owes_since is None and requests:
                self._owes_since = time.monotonic()
        for request in requests:
            self._send(request)
        return generation

    def close(self, timeout: float) -> None:
        """Ends the worker: by a message, or by force if it has not followed within `timeout` seconds."""
        self._end_generations(replace(self.status, state=State.STOPPED))
        self._send(Shutdown())
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("worker pid=%d did not stop within %g s and is killed", self._worker.pid, timeout)
            self._worker.kill()
            self._thread.join()

    def _abort(self, request_ids: list[str]) -> None:
        with self._lock:
            known = [request_id for request_id in request_ids if self._generations.pop(request_id, None)]
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
            # Without this thread every open request would wait for ever, so the replica exits.
            _log.exception("the thread that talks to the worker failed")
            self._fail(f"the thread that talks to worker pid={self._worker.pid} failed ({fault!r})")
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
                # Its last words may still be on their way through ZeroMQ's own thread. One that was killed
                # had none to say, and its requests shall go on elsewhere soon.
                patience = _HASTE if self._worker.was_killed() else _LAST_WORDS
                while self._socket.poll(patience):
                    self._receive()
                return

    def _send_queued(self) -> None:
        while not self._outgoing.empty():
            message = self._outgoing.get()
            if self._identity is not None:
                self._send_now(self._identity, message)
            elif isinstance(message, Shutdown):
                # It has not even said hello, so it listens to nothing else.
                self._worker.kill()

    def _send_now(self, identity: bytes, message: ToWorker) -> None:
        try:
            data = _encoder.encode(message)
        except Exception as fault:
            if not isinstance(message, AddRequest):
                raise
            # For example a number too large for a message. Only this request fails.
            _log.exception("request=%s cannot be sent to the worker", message.request_id)
            why = f"the request cannot be sent to the engine ({type(fault).__name__})"
            self._hand_out(TokenOutput(message.request_id, [], FinishReason.ERROR, message=why))
        else:
            self._socket.send_multipart([identity, data])

    def _receive(self) -> None:
        identity, *frames = self._socket.recv_multipart()
        try:
            message = _decoder.decode(b"".join(frames))
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            if identity == self._identity:
                # A lost message is a hole in some client's text, so there is no going on.
                self._fail(f"worker pid={self._worker.pid} sent an unreadable message ({printable(error)})")
            return
        if identity == self._identity:
            self._dispatch(message)
        elif self._identity is None and isinstance(message, Hello):
            self._greet(identity, message)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            _log.warning("a stranger (it says pid=%d) tried to be the worker and was ignored", hello.pid)
        elif hello.version != PROTOCOL_VERSION:
            self._fail(f"worker speaks protocol {hello.version}, this process {PROTOCOL_VERSION}")
        else:
            self._identity = identity

    def _dispatch(self, message: FromWorker) -> None:
        match message:
            case StepOutputs():
                self.stats = message.stats
                for output in message.outputs:
                    self._hand_out(output)
                with self._lock:
                    self._owes_since = time.monotonic() if self._generations else None
            case LoadProgress():
                if self.status.state is State.LOADING:
                    self.status = replace(self.status, progress=message.fraction, stage=message.stage)
            case Ready():
                if self.status.state is State.LOADING:
                    self.ready = message
                    self.status = EngineStatus(State.READY, 1.0, "ready")
                    _log.info("ready: worker pid=%d, %d blocks", self._worker.pid, message.num_blocks)
            case Failed():
                self._fail(message.message)

    def _hand_out(self, output: TokenOutput) -> None:
        with self._lock:
            if output.finish_reason is None:
                generation = self._generations.get(output.request_id)
            else:
                generation = self._generations.pop(output.request_id, None)
        if generation is not None:
            generation._events.put(output)

    def _fail(self, message: str) -> None:
        """The worker is of no use any more; its end, which follows, reports `message`."""
        if self.status.state is not State.STOPPED:
            self.status = replace(self.status, state=State.FAILED, message=message)
        self._worker.kill()

    def _worker_ended(self) -> None:
        how = self._worker.end()
        self._socket.close()
        if self.status.state is State.STOPPED:
            _log.info("worker pid=%d %s", self._worker.pid, how)
            return
        message = self.status.message or f"worker pid={self._worker.pid} {how}"
        self._end_generations(replace(self.status, state=State.FAILED, message=message))
        self._on_failure(message)

    def _end_generations(self, status: EngineStatus) -> None:
        with self._lock:
            self.status = status
            open_generations = set(self._generations.values())
            self._generations.clear()
        for generation in open_generations:
            lost = EngineLost if status.state is State.FAILED else ReplicaUnavailable
            generation._events.put(lost(_unavailable(status)))


class Generation:
    """Tokens of the sequences of one client request, in the order in which they are drawn.

    Iterating ends when every sequence has ended. It raises `ReplicaUnavailable` when the engine fails and
    `ClientGone` after `cancel()`. None means that nothing has come for as long as `patience` lasts.
    """

    def __init__(
        self, engine: EngineClient, request_ids: list[str], patience: Callable[[], float] | None
    ) -> None:
        self._engine = engine
        self._patience = patience
        self._open = dict.fromkeys(request_ids)
        self._events: queue.SimpleQueue[TokenOutput | FastDeployError] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[TokenOutput | None]:
        patience = self._patience
        while self._open:
            try:
                event = self._events.get(timeout=None if patience is None else patience())
            except queue.Empty:
                yield None
                continue
            if isinstance(event, FastDeployError):
                raise event
            # Tokens of a sequence that was stopped meanwhile are dropped.
            if event.request_id in self._open:
                if event.finish_reason is not None:
                    del self._open[event.request_id]
                yield event

    def stop(self, request_id: str) -> None:
        """This sequence needs no more tokens: its text is complete. For the iterating thread only."""
        if request_id in self._open:
            del self._open[request_id]
            self._engine._abort([request_id])

    def cancel(self) -> None:
        """For any thread: frees what the engine holds for this, and wakes the iterating thread."""
        self._engine._abort(list(self._open))
        self._events.put(ClientGone("the client has closed its connection"))

    def close(self) -> None:
        """Frees what is not finished. For the iterating thread only."""
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


def _unavailable(status: EngineStatus) -> str:
    match status.state:
        case State.LOADING:
            return f"the model is being loaded ({status.progress:.0%}, {status.stage}); try again later"
        case State.STOPPED:
            return "the server is shutting down"
        case _:
            return "the engine of this replica has stopped working"
