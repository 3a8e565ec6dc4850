"""A worker and its model in the process of a user: what a replica has, without HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import Self

import werkzeug.test
from flask import Flask

from ...common.errors import FastDeployError
from ...config import ModelConfig
from ..openai.app import create_app
from ..openai.engine_client import EngineClient, EngineState, EngineStatus
from ..openai.options import ServeConfig
from ..openai.served_model import ServedModel

#: Seconds for the worker to end before it is killed.
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.02


class WorkerLost(FastDeployError):
    """The worker cannot start, or has ended before `close`."""


class OfflineEngine:
    """Starts the worker and returns at once; `wait_ready` waits for the model.

    The kernel kills the worker when this process ends, for whatever reason.

    Raises:
        FastDeployError: the model cannot be read.
    """

    def __init__(self, config: ServeConfig) -> None:
        ModelConfig.from_directory(config.engine.model)
        self._engine = EngineClient(config.engine, 0, lambda message: None)
        self.served = ServedModel(config, self._engine)
        self._started, self._closed = threading.Event(), threading.Event()
        self._start_error: OSError | None = None
        # The worker dies with the thread that starts it, and the caller's thread may end before `close`.
        threading.Thread(target=self._own_worker, name="worker-owner", daemon=True).start()
        self._started.wait()
        if self._start_error is not None:
            raise WorkerLost(f"the worker cannot be started ({self._start_error})")

    @property
    def worker_pid(self) -> int:
        return self._engine.worker_pid

    def wait_ready(self, report: Callable[[EngineStatus], None] = lambda status: None) -> None:
        """Wait until the model is loaded.

        Args:
            report: called again and again with the progress.

        Raises:
            WorkerLost: the worker cannot load it; the message has the reason.
        """
        while (status := self._engine.status).state is EngineState.LOADING:
            report(status)
            time.sleep(_POLL_SECONDS)
        self.require_alive()

    def require_alive(self) -> None:
        """Raise WorkerLost, with the reason, if the worker has failed."""
        status = self._engine.status
        if status.state is EngineState.FAILED:
            raise WorkerLost(status.message)

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Return status and body of the response that a server would send. For any thread."""
        client = werkzeug.test.Client(self._app)
        response = client.post(path, data=body, headers=headers, content_type="application/json")
        with response:
            return response.status_code, response.get_data()

    def close(self, seconds: float = _STOP_SECONDS) -> None:
        """Stop the worker; kill it after `seconds`. Requests in progress end with ReplicaUnavailable."""
        if not self._closed.is_set():
            self._engine.close(seconds)
            self._closed.set()

    @cached_property
    def _app(self) -> Flask:
        return create_app(self.served)

    def _own_worker(self) -> None:
        try:
            self._engine.start()
        except OSError as error:
            self._start_error = error
            self._closed.set()
        self._started.set()
        self._closed.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error or Ctrl-C, do not wait for a step in progress.
        self.close(_STOP_SECONDS if error is None else 0.0)
