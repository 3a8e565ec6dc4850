"""Heartbeat of gunicorn's workers, in memory instead of a file."""

from __future__ import annotations

import os

from .gunicorn_base import WorkerTmp, worker_base


class _MemoryHeartbeat(WorkerTmp):
    """Heartbeat without a file in /tmp."""

    def __init__(self, cfg: object) -> None:
        self._tmp = os.fdopen(os.memfd_create("worker-heartbeat"), "w+b", 0)


def keep_in_memory() -> None:
    """Use heartbeats in memory for all workers that this process starts from now on."""
    worker_base.WorkerTmp = _MemoryHeartbeat
