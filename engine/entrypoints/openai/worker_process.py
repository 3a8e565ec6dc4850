"""The worker of this replica as a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...config import EngineConfig

WORKER_COMMAND = (sys.executable, "-m", "fastdeploy.core.worker")


class WorkerProcess:
    """The running worker. Create it in the main thread: the worker dies with the thread that started it."""

    def __init__(
        self, config: EngineConfig, endpoint: str, token: str, command: Sequence[str] = WORKER_COMMAND
    ) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            # A process group of its own, because Ctrl-C and supervisors signal whole groups, and only this
            # process may stop its worker.
            process_group=0,
            env={
                **os.environ,
                "FD_ENGINE_CONFIG": encode_config(config),
                "FD_WORKER_ENDPOINT": endpoint,
                "FD_WORKER_TOKEN": token,
                "FD_PARENT_PID": str(os.getpid()),
            },
        )
        #: Readable once the process has exited.
        self.pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def was_killed(self) -> bool:
        """Wait for the exit; return True if a signal caused it."""
        return self._process.wait() < 0

    def end(self) -> str:
        """Wait for the exit and describe it: "was killed by SIGKILL", "exited with code 1"."""
        code = self._process.wait()
        if code >= 0:
            return f"exited with code {code}"
        return f"was killed by {signal.Signals(-code).name}"


def encode_config(config: EngineConfig) -> str:
    return msgspec.json.encode(config, enc_hook=_encode_path).decode()


def _encode_path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"cannot encode {type(value).__name__}")
