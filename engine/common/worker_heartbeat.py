"""Keeps the heartbeat of gunicorn's workers in memory instead of a file."""

from __future__ import annotations

import os

from gunicorn.workers import base
from gunicorn.workers.workertmp import WorkerTmp


class _MemoryHeartbeat(WorkerTmp):
    """A heartbeat that needs no file in /tmp."""

    def __init__(self, cfg: object) -> None:
        self._tmp = os.fdopen(os.memfd_create("worker-heartbeat"), "w+b", 0)


def keep_in_memory() -> None:
    """Keep the heartbeats of all workers that this process starts from now on in memory."""
    base.WorkerTmp = _MemoryHeartbeat
