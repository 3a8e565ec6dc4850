"""The worker process of a replica: the engine behind a socket (``python -m fastdeploy.core.worker``).

The API process starts it with its configuration in the environment: FD_ENGINE_CONFIG (JSON),
FD_WORKER_ENDPOINT, FD_WORKER_TOKEN and FD_PARENT_PID. Paddle and NumPy are imported only after their thread
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
from ..device.choice import choose_gpu
from ..device.errors import DeviceBroken
from .cpu_share import SINGLE_THREADED, CpuShare, share_of

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from ..device.choice import Gpu
    from ..device.device import Device, Progress
    from ..grammar.matchers import Grammars
    from .engine import EngineCore
    from .expert_rank import Rank

# Not __name__, which is __main__ here.
_log = logging.getLogger("fastdeploy.core.worker")

_ENVIRONMENT = ("FD_ENGINE_CONFIG", "FD_WORKER_ENDPOINT", "FD_WORKER_TOKEN", "FD_PARENT_PID")
#: Exit status after `DeviceBroken`: the fault lies with the device or its driver, not with the configuration.
EXIT_DEVICE_BROKEN = 75
_PR_SET_NAME = 15
#: Prompt tokens of a step from which on a GPU is well used.
_LEAST_GPU_PREFILL = 512
#: Interval at which an idle rank checks for steps of the others, in case its doorbell was removed.
_POLL_SECONDS = 1.0
#: Interval of statistics while only other ranks have work.
_STATS_SECONDS = 1.0


def main() -> int:
    """Load the model and serve until SIGTERM or `Shutdown`.

    Returns:
        The exit status: 0 after SIGTERM or `Shutdown`, 1 after a failure that was reported to the API
        process, 2 if not started by an API process, 75 if the device broke.
    """
    try:
        config_json, endpoint, token, parent_pid = (os.environ[name] for name in _ENVIRONMENT)
    except KeyError as missing:
        print(
            f"fastdeploy.core.worker: {missing.args[0]} is not set; "
            "this process is started by the API server",
            file=sys.stderr,
        )
        return 2
    die_with_parent(int(parent_pid))
    # Ctrl-C reaches the whole process group, but the API process decides how to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ApiLink(endpoint) as api:
        api.send(Hello(token, os.getpid()))
        try:
            config = _decode_config(config_json)
            _name_and_log(config)
            # Paddle and NumPy read these on import.
            os.environ.update(SINGLE_THREADED)
            serve(*load(config, api), api)
        except DeviceBroken as error:
            _fail(api, str(error))
            return EXIT_DEVICE_BROKEN
        # ImportError: the operations are not built, or not for this machine.
        except (FastDeployError, OSError, ImportError, MemoryError) as error:
            return _fail(api, str(error) or "not enough memory")
        except Exception as error:
            _log.exception("worker failed")
            return _fail(api, f"the worker failed with {type(error).__name__}; worker.log has the details")
    _log.info("worker stopped")
    return 0


def load(config: EngineConfig, api: ApiLink) -> tuple[EngineCore, Rank | None]:
    """Build the engine and join the expert-parallel group if configured, reporting progress to `api`."""

    def report(fraction: float, stage: str) -> None:
        api.send(LoadProgress(fraction, stage))
        # Only Shutdown can arrive before Ready.
        api.receive(wait=False)
        if api.stopping:
            raise SystemExit(0)

    model_config = ModelConfig.from_directory(config.model)
    _warn(config, model_config)
    share = share_of(config, sorted(os.sched_getaffinity(0)))
    gpu = choose_gpu(config, model_config)
    if gpu is not None and not gpu.is_cpu:
        config = config.on_gpu()
    device = (
        _open_cpu(config, model_config, share, api, report)
        if gpu is None
        else _open_gpu(config, model_config, gpu, share, report)
    )

    from .engine import EngineCore

    device.load(report)
    num_blocks = device.allocate_cache(report)
    grammars = _grammars(config, model_config, share)
    engine = EngineCore(config, model_config, device, num_blocks, grammars)
    # Exclude all current objects from garbage collection; a full collection would stop a step for 100 ms.
    gc.collect()
    gc.freeze()
    rank = None
    if config.enable_expert_parallel and model_config.num_moe_layers:
        from ..device.paddle_cpu import PaddleDevice
        from .expert_rank import Rank

        report(1.0, f"joining the expert group {config.expert_parallel_group}")
        assert isinstance(device, PaddleDevice), "a GPU is refused for an expert group"
        # Last, because from here on the other ranks wait for this one.
        rank = Rank.join(config, model_config, device, share)
        engine.read_group = rank.group.status
    uuid = "" if gpu is None else gpu.uuid
    numeric_version = f"{device.numeric_version}/{config.weight_format}"
    api.send(Ready(num_blocks, config.block_size, config.max_model_len, uuid, numeric_version))
    _log.info(
        "ready: %s in %s, %d blocks of %d tokens, %s",
        config.model,
        config.weight_format,
        num_blocks,
        config.block_size,
        device.title,
    )
    return engine, rank


def serve(engine: EngineCore, rank: Rank | None, api: ApiLink) -> None:
    """Run the engine loop: receive messages; compute a step and send its tokens, or sleep without work.

    The rank also takes part in the steps of the other ranks of its group.
    """

    def is_wanted() -> bool:
        return rank is not None and rank.is_wanted

    if rank is not None:
        api.watch(rank.group.wakeups.fileno(), _POLL_SECONDS)
        # Reports the members of the group from the start.
        api.send(engine.on_idle())
    is_idle = True
    ran_dummy_batch, reported_at = False, time.monotonic()
    while not api.stopping:
        for message in api.receive(wait=not engine.has_work and not is_wanted()):
            match message:
                case AddRequest():
                    engine.add(message)
                    # The API process expects a reply even if the request is aborted before a step.
                    is_idle = False
                case AbortRequests():
                    engine.abort(message.request_ids)
        if engine.has_work:
            api.send(engine.step())
            is_idle = False
        elif rank is not None:
            rank.execute_dummy_batch()
            ran_dummy_batch = True
        if engine.has_work:
            continue
        # Update the gauges, also after an abort that no step follows.
        is_stale = not is_idle
        if ran_dummy_batch:
            is_stale |= not is_wanted() or time.monotonic() - reported_at > _STATS_SECONDS
        if is_stale:
            api.send(engine.on_idle())
            is_idle, ran_dummy_batch, reported_at = True, False, time.monotonic()
    if rank is not None:
        rank.leave()


class ApiLink:
    """The connection to the API process; `stopping` is set by SIGTERM or `Shutdown`."""

    def __init__(self, endpoint: str) -> None:
        self.stopping = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # Unlimited, because sending must not block a step. If the API process dies, the kernel kills this
        # one.
        self._socket.set_hwm(0)
        # The error of a worker that cannot start must arrive.
        self._socket.linger = 2000
        self._socket.connect(endpoint)
        # A signal writes a byte here, which ends a wait in `receive`; setting `stopping` would not.
        self._signalled, self._signal_sink = socket.socketpair()
        self._signalled.setblocking(False)
        self._signal_sink.setblocking(False)
        self._timeout_ms: int | None = None
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

    def watch(self, descriptor: int, timeout: float) -> None:
        """End a wait in `receive` also when `descriptor` is readable, or after `timeout` seconds."""
        self._poller.register(descriptor, zmq.POLLIN)
        self._timeout_ms = int(timeout * 1000)

    def receive(self, *, wait: bool) -> list[AddRequest | AbortRequests]:
        """Return the messages that have arrived.

        With `wait`, sleep until there is a message, a watched descriptor is readable, or the process is to
        stop.
        """
        if wait:
            self._poller.poll(self._timeout_ms)
        messages: list[AddRequest | AbortRequests] = []
        while True:
            try:
                received = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                message = self._decoder.decode(received)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                # It cannot be ignored: if it is a request, its client would wait forever.
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
    # Shown by ps and top.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"fd-worker-{rank}".encode(), 0, 0, 0)
    log.configure(f"replica={rank}", "worker.log")
    # Prints the stacks of a worker that hangs.
    faulthandler.register(signal.SIGUSR2)


def _warn(config: EngineConfig, model_config: ModelConfig) -> None:
    if config.enable_expert_parallel and not model_config.num_moe_layers:
        _log.warning("--enable-expert-parallel has no effect: %s has no experts", config.model)
    if config.max_model_len > model_config.max_position_embeddings:
        _log.warning(
            "--max-model-len %d exceeds max_position_embeddings %d of %s; quality of long texts may suffer",
            config.max_model_len,
            model_config.max_position_embeddings,
            config.model,
        )


def _grammars(config: EngineConfig, model_config: ModelConfig, share: CpuShare) -> Grammars:
    from ..grammar.matchers import Grammars

    def read_vocabulary() -> LLTokenizer:
        from ..grammar.vocabulary import grammar_vocabulary
        from ..tokenizer.tokenizer import Tokenizer

        # The API process renders templates; an empty one replaces the checkpoint's.
        tokenizer = Tokenizer.from_directory(config.model, chat_template=" ")
        return grammar_vocabulary(tokenizer, model_config.vocab_size)

    return Grammars(read_vocabulary, share.threads)


def _open_gpu(
    config: EngineConfig, model_config: ModelConfig, gpu: Gpu, share: CpuShare, report: Progress
) -> Device:
    report(0.0, "opening the CPU" if gpu.is_cpu else f"opening GPU {gpu.ordinal}, {gpu.name}")
    if not gpu.is_cpu and config.max_prefill_beside_decode < _LEAST_GPU_PREFILL:
        _log.warning(
            "--max-prefill-beside-decode %d suits CPUs; on a GPU prompts wait less with %d or more",
            config.max_prefill_beside_decode,
            _LEAST_GPU_PREFILL,
        )
    from ..device.cuda import CudaDevice

    return CudaDevice(config, model_config, gpu, share.pinned or [-1] * share.threads)


def _open_cpu(
    config: EngineConfig, model_config: ModelConfig, share: CpuShare, api: ApiLink, report: Progress
) -> Device:
    report(0.0, "starting Paddle")
    _start_paddle(api)

    from .. import custom_ops
    from ..device.paddle_cpu import PaddleDevice

    custom_ops.set_threads(share.threads, share.pinned)
    return PaddleDevice(config, model_config, share.threads)


def _start_paddle(api: ApiLink) -> None:
    # The import replaces the handlers of SIGTERM and of faulthandler's signals. Block SIGTERM until they are
    # restored.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        import_paddle()
    except ImportError as error:
        raise ConfigError(
            f"Paddle cannot be imported ({error}); install paddlepaddle or paddlepaddle-gpu"
        ) from None
    faulthandler.enable()
    api.handle_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


if __name__ == "__main__":
    sys.exit(main())
