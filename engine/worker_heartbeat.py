"""The sign of life that a gunicorn worker gives its arbiter, in memory instead of a file."""

from __future__ import annotations

import os

from gunicorn.workers import base
from gunicorn.workers.workertmp import WorkerTmp


class _MemoryHeartbeat(WorkerTmp):
    """In place of a file in /tmp, without which no worker starts."""

    def __init__(self, cfg: object) -> None:
        self._tmp = os.fdopen(os.memfd_create("worker-heartbeat"), "w+b", 0)


def keep_in_memory() -> None:
    """Let all workers that this process starts from now on have their sign of life in memory."""
    base.WorkerTmp = _MemoryHeartbeat
