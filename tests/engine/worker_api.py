"""Workers as real processes, driven over their sockets as the API process drives them: one, or a group."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from fastdeploy.common.messages import AddRequest, Failed, FromWorker, Ready, StepOutputs, ToWorker
from fastdeploy.common.request import FinishReason, SamplingParams
from fastdeploy.config import EngineConfig
from fastdeploy.entrypoints.openai.worker_process import encode_config

from ..forked import ForkedProcess

FIXTURES = Path(__file__).parent.parent / "fixtures"
CONFIG = EngineConfig(
    model=FIXTURES / "tiny",
    # The dtype in which the reference texts were made.
    dtype="float32",
    device="cpu",
    threads=1,
    max_model_len=512,
    block_size=16,
    max_num_batched_tokens=64,
)
TOKEN = "a token of this test"
AS_MODULE = ("-m", "fastdeploy.core.worker")
# Generous, as the machine may be busy; no test waits this long unless it fails.
DEADLINE_S = 60.0

Message = TypeVar("Message", bound=FromWorker)


class Api:
    """The API process's side: a ROUTER socket, and the worker as a child."""

    def __init__(
        self,
        config: EngineConfig,
        logs: Path,
        *arguments: str,
        launcher: Sequence[str] = (),
        forked: bool = False,
        **env: str,
    ) -> None:
        """
        Args:
            launcher: a command prefix that executes the command after it.
            forked: True for a worker that need not import Paddle, see `tests/forked.py`.
        """
        logs.mkdir(parents=True, exist_ok=True)
        self._log_file = logs / "worker.log"
        self._stderr = (logs / "stderr").open("w+")
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = 0
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self._identity = b""
        env = {
            **os.environ,
            "FD_ENGINE_CONFIG": encode_config(config),
            "FD_WORKER_ENDPOINT": f"tcp://127.0.0.1:{port}",
            "FD_WORKER_TOKEN": TOKEN,
            "FD_PARENT_PID": str(os.getpid()),
            "FD_LOG_DIR": str(logs),
            **env,
        }
        self.process: subprocess.Popen[bytes] | ForkedProcess
        if forked:
            self.process = ForkedProcess(_run_worker, logs / "stderr", env=env)
        else:
            command = [*launcher, sys.executable, *(arguments or AS_MODULE)]
            self.process = subprocess.Popen(command, env=env, stderr=self._stderr)

    def send(self, message: ToWorker) -> None:
        self.socket.send_multipart([self._identity, msgspec.msgpack.encode(message)])

    def receive(self) -> FromWorker:
        deadline = time.monotonic() + DEADLINE_S
        while not self.socket.poll(200):
            assert self.process.poll() is None or self.socket.poll(1000), f"worker has ended: {self.log()}"
            assert time.monotonic() < deadline, f"worker says nothing: {self.log()}"
        self._identity, frame = self.socket.recv_multipart()
        return msgspec.msgpack.decode(frame, type=FromWorker)

    def receive_until(self, kind: type[Message]) -> Message:
        while not isinstance(message := self.receive(), kind):
            assert not isinstance(message, Failed), message.message
        return message

    def receive_stats_when(self, condition: Callable[[StepOutputs], bool]) -> StepOutputs:
        while not condition(message := self.receive_until(StepOutputs)):
            pass
        return message

    def generate(self, requests: list[AddRequest]) -> dict[str, list[int]]:
        texts: dict[str, list[int]] = {request.request_id: [] for request in requests}
        unfinished = set(texts)
        for request in requests:
            self.send(request)
        while unfinished:
            for output in self.receive_until(StepOutputs).outputs:
                texts[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    assert output.finish_reason is not FinishReason.ERROR, output.message
                    unfinished.remove(output.request_id)
        return texts

    def log(self) -> str:
        return self._log_file.read_text() if self._log_file.exists() else ""

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()
        self._context.term()
        self._stderr.close()


def _run_worker(stderr: Path) -> None:
    from . import trapped_worker

    with stderr.open("ab") as file:
        os.dup2(file.fileno(), 2)
    os.environ["FD_PARENT_PID"] = str(os.getppid())
    sys.exit(trapped_worker.main())


def request(name: str, prompt: list[int], **params: object) -> AddRequest:
    values = {"max_tokens": 64, "temperature": 0.0} | params
    return AddRequest(name, prompt, SamplingParams(**values), arrival_time=0.0)  # type: ignore[arg-type]


#: Token ids of one rank's requests, by request id.
Texts = dict[str, list[int]]


class Ranks:
    """The workers of an expert-parallel group, which generate their texts at the same time."""

    def __init__(
        self,
        config: EngineConfig,
        count: int,
        group: str,
        logs: Path,
        *,
        shared: bool = True,
        launcher: Sequence[str] = (),
        forked: bool = False,
        **env: str,
    ) -> None:
        """
        Args:
            shared: False for workers that each have all experts.
            forked: True for workers that need not import Paddle, see `tests/forked.py`.
        """
        self._config = replace(
            config, data_parallel_size=count, enable_expert_parallel=shared, expert_parallel_group=group
        )
        self.group = group
        self._logs = logs
        self._env = env
        self._launcher = launcher
        self._forked = forked
        self.apis: dict[int, Api] = {}
        #: Including workers that have been replaced.
        self.all: list[Api] = []

    def start(self, *seats: int, trap: str | None = None, isa: str | None = None, **changes: object) -> None:
        """
        Args:
            trap: the place where the worker sends itself a signal, see `trapped_worker.py`.
            isa: their instruction set.
            changes: changes to the configuration of these ranks.
        """
        arguments, env = AS_MODULE, self._env
        if trap is not None:
            arguments = ("-m", "tests.engine.trapped_worker")
            env = env | {"FD_TEST_TRAP": trap, "PYTHONPATH": str(FIXTURES.parent.parent)}
        forked = self._forked
        if isa is not None:
            # A forked worker has loaded the kernels already.
            env, forked = env | {"FD_ISA": isa}, False
        for seat in seats:
            config = replace(self._config, data_parallel_rank=seat, **changes)  # type: ignore[arg-type]
            logs = self._logs / f"{seat}-{len(self.all)}"
            self.apis[seat] = Api(config, logs, *arguments, launcher=self._launcher, forked=forked, **env)
            self.all.append(self.apis[seat])

    def wait_ready(self, *seats: int) -> None:
        for seat in seats or tuple(self.apis):
            self.apis[seat].receive_until(Ready)

    def generate(
        self,
        requests: Mapping[int, list[AddRequest]],
        after: Callable[[int], None] = lambda tokens: None,
        mortal: Collection[int] = (),
        on_tokens: Callable[[int], None] = lambda seat: None,
    ) -> dict[int, Texts]:
        """
        Args:
            requests: requests by seat.
            on_tokens: called with the seat whose tokens have arrived.
            mortal: seats whose workers may end.
            after: called with the number of tokens from all ranks, whenever some have arrived.

        Returns:
            The texts of those seats whose worker is still the one that got the requests.
        """
        apis = {seat: self.apis[seat] for seat in requests}
        texts: dict[int, Texts] = {
            seat: {one.request_id: [] for one in asked} for seat, asked in requests.items()
        }
        open_requests = {(seat, name) for seat, asked in texts.items() for name in asked}
        for seat, asked in requests.items():
            for one in asked:
                self.apis[seat].send(one)
        poller = zmq.Poller()
        for api in apis.values():
            poller.register(api.socket, zmq.POLLIN)
        tokens, deadline = 0, time.monotonic() + DEADLINE_S
        while open_requests:
            ready = dict(poller.poll(100))
            for seat, api in apis.items():
                if self.apis.get(seat) is not api:
                    open_requests = {one for one in open_requests if one[0] != seat}
                    continue
                if api.socket not in ready:
                    if seat in mortal and api.process.poll() is not None:
                        self.lose(seat)
                        continue
                    assert api.process.poll() is None, f"seat {seat} has ended: {api.log()}"
                    continue
                message = api.receive()
                assert not isinstance(message, Failed), message.message
                outputs = message.outputs if isinstance(message, StepOutputs) else []
                if outputs:
                    on_tokens(seat)
                for output in outputs:
                    texts[seat][output.request_id] += output.token_ids
                    tokens += len(output.token_ids)
                    if output.finish_reason is not None:
                        assert output.finish_reason is not FinishReason.ERROR, output.message
                        open_requests.discard((seat, output.request_id))
            if ready:
                after(tokens)
            assert time.monotonic() < deadline, f"open after {DEADLINE_S} s: {sorted(open_requests)}"
        return {seat: texts[seat] for seat, api in apis.items() if self.apis.get(seat) is api}

    def lose(self, seat: int) -> Api:
        """Return the worker in this seat, and stop waiting for it."""
        return self.apis.pop(seat)

    def stop(self) -> None:
        """Stop the workers as a replica does when it is stopped; each must end with exit code 0."""
        for api in self.apis.values():
            api.process.terminate()
        for api in self.apis.values():
            assert api.process.wait(DEADLINE_S) == 0, api.log()

    def logs(self) -> str:
        return "".join(api.log() for api in self.all)

    def close(self) -> None:
        for api in self.all:
            api.close()
