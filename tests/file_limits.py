"""Limits of open files for processes that a test starts."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def low_file_limit() -> Iterator[None]:
    """Give children a soft limit as low as many systems have it.

    It is at least 256, and above the number of files that this process has open itself.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = max(256, len(os.listdir("/proc/self/fd")) + 100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
