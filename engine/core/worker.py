"""The worker process of a replica: the engine behind a socket (``python -m fastdeploy.core.worker``).

The API process starts it and says in the environment what it needs: FD_ENGINE_CONFIG (JSON),
FD_WORKER_ENDPOINT, FD_WORKER_TOKEN and FD_PARENT_PID. Paddle and NumPy are imported late, after their thread
counts are set (see cpu_share.py).
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec
import zmq

from ..common import log
from ..common.errors import ConfigError, FastDeployError
from ..common.foreign_text import printable
from ..common.messages import (
    AbortRequests,
    AddRequest,
    Failed,
    FromWorker,
    Hello,
    LoadProgress,
    Ready,
    Shutdown,
    ToWorker,
)
from ..common.paddle_import import import_paddle
from ..common.process_control import die_with_parent
from ..config import EngineConfig, ModelConfig
from .cpu_share import SINGLE_THREADED, share_of

if TYPE_CHECKING:
    from .engine import EngineCore
    from .expert_rank import Rank

# Not __name__, which is __main__ here.
_log = logging.getLogger("fastdeploy.core.worker")

_ENVIRONMENT = ("FD_ENGINE_CONFIG", "FD_WORKER_ENDPOINT", "FD_WORKER_TOKEN", "FD_PARENT_PID")
_PR_SET_NAME = 15
#: An idle rank looks so often whether it is called. Only needed where somebody has removed its doorbell.
_LOOK_SECONDS = 1.0
#: Between two words about steps in which only others have work.
_TELL_SECONDS = 1.0


def main() -> int:
    """Loads the model and serves until it is told to stop.

    Returns:
        0 after SIGTERM or `Shutdown`, 1 after a failure (the API process has been told why), 2 when it was
        not started by an API process.
    """
    try:
        config_json, endpoint, token, parent_pid = (os.environ[name] for name in _ENVIRONMENT)
    except KeyError as missing:
        print(
            f"{missing.args[0]} is not set: start the API server, which starts this process",
            file=sys.stderr,
        )
        return 2
    die_with_parent(int(parent_pid))
    # Ctrl-C reaches the whole process group. The API process decides what it means and says so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ApiLink(endpoint) as api:
        api.send(Hello(token, os.getpid()))
        try:
            config = _decode_config(config_json)
            _name_and_log(config)
            # Before Paddle and NumPy are imported, which read these then.
            os.environ.update(SINGLE_THREADED)
            serve(*load(config, api), api)
        # ImportError: the operations were not built, or not for this machine.
        except (FastDeployError, OSError, ImportError, MemoryError) as error:
            return _fail(api, str(error) or "not enough memory")
        except Exception as error:
            _log.exception("worker failed")
            return _fail(api, f"the worker failed with {type(error).__name__}; worker.log has the details")
    _log.info("worker stopped")
    return 0


def load(config: EngineConfig, api: ApiLink) -> tuple[EngineCore, Rank | None]:
    """Builds the engine and joins the group of ranks, if there is to be one, telling `api` how far it is."""

    def report(fraction: float, stage: str) -> None:
        api.send(LoadProgress(fraction, stage))
        # Nothing but Shutdown comes before Ready.
        api.receive(wait=False)
        if api.stopping:
            raise SystemExit(0)

    model_config = ModelConfig.from_directory(config.model)
    _check_device(config)
    _warn(config, model_config)
    report(0.0, "starting Paddle")
    _start_paddle(config, api)

    from .. import custom_ops
    from ..models.ernie45 import Ernie45
    from ..weights.checkpoint import load_weights
    from .engine import EngineCore
    from .model_runner import ModelRunner

    share = share_of(config, sorted(os.sched_getaffinity(0)))
    custom_ops.set_threads(share.threads, share.pinned)
    weights = load_weights(
        config.model,
        model_config,
        weight_format=config.weight_format,
        qkv_order=config.qkv_order,
        progress=report,
    )
    num_blocks = config.num_blocks(model_config)
    report(1.0, f"allocating a cache of {num_blocks} blocks")
    runner = ModelRunner(Ernie45(model_config, weights), model_config, config, num_blocks)
    engine = EngineCore(config, model_config, runner, num_blocks)
    # What is alive now stays: a full collection would walk over all of it, and stop a step for 100 ms.
    gc.collect()
    gc.freeze()
    rank = None
    if config.enable_expert_parallel and model_config.num_moe_layers:
        from .expert_rank import Rank

        report(1.0, f"joining the expert group {config.expert_parallel_group}")
        # The last of all: from here on the others wait for this rank.
        rank = Rank.join(config, model_config, runner, share)
        engine.read_group = rank.group.status
    api.send(Ready(num_blocks, config.block_size, config.max_model_len))
    _log.info(
        "ready: %s in %s, %d blocks of %d tokens, %d threads on %s",
        config.model,
        config.weight_format,
        num_blocks,
        config.block_size,
        share.threads,
        custom_ops.instruction_set(),
    )
    return engine, rank


def serve(engine: EngineCore, rank: Rank | None, api: ApiLink) -> None:
    """The engine loop: messages in, a step if there is work, its tokens out; asleep when there is none.

    Steps of other ranks of the group are steps of this one, too.
    """

    def is_wanted() -> bool:
        return rank is not None and rank.is_wanted

    if rank is not None:
        api.watch(rank.group.wakeups.fileno(), _LOOK_SECONDS)
        # Who is in the group is seen from the start.
        api.send(engine.rest())
    resting = True
    assisted, told = False, time.monotonic()
    while not api.stopping:
        for message in api.receive(wait=not engine.has_work and not is_wanted()):
            match message:
                case AddRequest():
                    engine.add(message)
                    # Whoever has sent it waits for a word, even if it is aborted before a step.
                    resting = False
                case AbortRequests():
                    engine.abort(message.request_ids)
        if engine.has_work:
            api.send(engine.step())
            resting = False
        elif rank is not None:
            rank.assist()
            assisted = True
        if engine.has_work:
            continue
        # Also after an abort, which no step follows: gauges must not stay where they were.
        stale = not resting
        if assisted:
            stale |= not is_wanted() or time.monotonic() - told > _TELL_SECONDS
        if stale:
            api.send(engine.rest())
            resting, assisted, told = True, False, time.monotonic()
    if rank is not None:
        rank.leave()


class ApiLink:
    """The socket to the API process, and what tells this process to stop: SIGTERM or `Shutdown`."""

    def __init__(self, endpoint: str) -> None:
        self.stopping = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # No limit: sending must never block a step. If the API process is gone the kernel kills this one.
        self._socket.set_hwm(0)
        # The last words of a worker that cannot start must arrive.
        self._socket.linger = 2000
        self._socket.connect(endpoint)
        # A signal writes a byte here and so ends a wait in `receive`; the flag alone would be seen too late.
        self._signalled, self._signal_sink = socket.socketpair()
        self._signalled.setblocking(False)
        self._signal_sink.setblocking(False)
        self._patience_ms: int | None = None
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._signalled.fileno(), zmq.POLLIN)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self.handle_signals()

    def handle_signals(self) -> None:
        signal.set_wakeup_fd(self._signal_sink.fileno())
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def send(self, message: FromWorker) -> None:
        self._socket.send(self._encoder.encode(message))

    def watch(self, descriptor: int, patience: float) -> None:
        """Ends a wait in `receive` also when this is readable, or after `patience` seconds."""
        self._poller.register(descriptor, zmq.POLLIN)
        self._patience_ms = int(patience * 1000)

    def receive(self, *, wait: bool) -> list[AddRequest | AbortRequests]:
        """What has arrived; with `wait` sleeps until something has, until a watched descriptor
        is readable, or the process is to stop."""
        if wait:
            self._poller.poll(self._patience_ms)
        messages: list[AddRequest | AbortRequests] = []
        while True:
            try:
                received = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                message = self._decoder.decode(received)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                # If it was a request, its client would wait for ever.
                raise FastDeployError(
                    f"the API process sent an unreadable message ({printable(error)})"
                ) from None
            if isinstance(message, Shutdown):
                self.stopping = True
            else:
                messages.append(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        self._socket.close()
        self._context.term()
        self._signalled.close()
        self._signal_sink.close()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True


def _fail(api: ApiLink, message: str) -> int:
    _log.error("%s", message)
    api.send(Failed(message))
    return 1


def _decode_config(text: str) -> EngineConfig:
    def path(kind: type, value: Any) -> Any:
        assert kind is Path
        return Path(value)

    return msgspec.json.decode(text, type=EngineConfig, dec_hook=path)


def _name_and_log(config: EngineConfig) -> None:
    rank = config.data_parallel_rank
    # What ps and top show.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"fd-worker-{rank}".encode(), 0, 0, 0)
    log.configure(f"replica={rank}", "worker.log")
    # For a worker that hangs: where it is.
    faulthandler.register(signal.SIGUSR2)


def _warn(config: EngineConfig, model_config: ModelConfig) -> None:
    if config.enable_expert_parallel and not model_config.num_moe_layers:
        _log.warning("--enable-expert-parallel has no effect: %s has no experts", config.model)
    if config.max_model_len > model_config.max_position_embeddings:
        _log.warning(
            "--max-model-len %d exceeds max_position_embeddings %d of %s; long texts may turn out badly",
            config.max_model_len,
            model_config.max_position_embeddings,
            config.model,
        )


def _start_paddle(config: EngineConfig, api: ApiLink) -> None:
    # The import removes our handlers of SIGTERM and of faulthandler's signals. A SIGTERM in the meantime
    # waits until ours is installed again.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        import_paddle()
        import paddle
    except ImportError as error:
        raise ConfigError(
            f"Paddle cannot be imported ({error}); install paddlepaddle or paddlepaddle-gpu"
        ) from None
    faulthandler.enable()
    api.handle_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # Also where a Paddle for GPUs is installed, which would put tensors there by itself.
    paddle.device.set_device("cpu")


def _check_device(config: EngineConfig) -> None:
    if config.device not in ("auto", "cpu"):
        raise ConfigError(
            f"--device is {config.device!r}; the operations are compiled for CPUs only so far: "
            "use auto or cpu"
        )


if __name__ == "__main__":
    sys.exit(main())
