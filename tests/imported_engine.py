"""Imports what a worker imports, without starting a thread: the process can then be forked."""

from __future__ import annotations

import os

from fastdeploy.common.paddle_import import import_paddle
from fastdeploy.core.cpu_share import SINGLE_THREADED

os.environ.update(SINGLE_THREADED)
import_paddle()

from fastdeploy.core import engine, expert_rank, worker  # noqa: E402
from fastdeploy.custom_ops import native  # noqa: E402
from fastdeploy.device import paddle_cpu  # noqa: E402
from fastdeploy.models import ernie45  # noqa: E402

__all__ = ["engine", "ernie45", "expert_rank", "paddle_cpu", "worker"]

native.library()
assert len(os.listdir("/proc/self/task")) == 1, "forked processes would lack a thread"
