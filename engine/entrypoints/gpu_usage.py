"""Memory and utilisation of a GPU, from NVIDIA's management library (the extra [gpu])."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)

#: Minimum seconds between two readings.
_INTERVAL = 1.0
#: Seconds that a caller waits for a reading; the driver answers in less than 10 ms, or hangs.
_PATIENCE = 0.25


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """Memory and utilisation of a GPU, by all of its processes together."""

    #: Bytes.
    memory_used: int
    memory_total: int
    #: Fraction of the time in which a kernel ran, 0..1; None if the driver does not report it.
    utilization: float | None


class GpuUsageReader:
    """Reads on demand in a thread of its own, so that a driver that hangs delays nothing else."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._usage: GpuUsage | None = None
        self._is_reading = False
        self._began_at = -_INTERVAL
        self._library: Any = None
        self._handle: Any = None
        self._problem = ""

    def read(self, uuid: str) -> GpuUsage | None:
        """Return the usage of a GPU, a second old at most; None if it cannot be read."""
        with self._changed:
            now = time.monotonic()
            if not self._is_reading and now - self._began_at >= _INTERVAL:
                self._is_reading, self._began_at = True, now
                threading.Thread(target=self._refresh, args=(uuid,), name="gpu-usage", daemon=True).start()
            patience = self._began_at + _PATIENCE - now
            self._changed.wait_for(lambda: not self._is_reading, max(0.0, patience))
            return None if self._is_reading else self._usage

    def _refresh(self, uuid: str) -> None:
        usage, problem = None, ""
        try:
            usage = self._query(uuid)
        except ImportError:
            problem = "pip install 'fd-dp[gpu]'"
        # Whatever the library raises must not cost the other metrics.
        except Exception as error:
            problem = str(error) or type(error).__name__
            # A GPU that was lost may come back.
            self._handle = None
        if problem and problem != self._problem:
            _log.info("no memory and utilisation of the GPU in the metrics: %s", problem)
        self._problem = problem
        with self._changed:
            self._usage, self._is_reading = usage, False
            self._changed.notify_all()

    def _query(self, uuid: str) -> GpuUsage:
        if self._library is None:
            import pynvml

            self._library = pynvml
        library = self._library
        if self._handle is None:
            library.nvmlInit()
            self._handle = _handle_of(library, uuid)
        memory = library.nvmlDeviceGetMemoryInfo(self._handle)
        try:
            utilization = library.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        except library.NVMLError_NotSupported:
            utilization = None
        return GpuUsage(int(memory.used), int(memory.total), utilization)


def _handle_of(library: Any, uuid: str) -> Any:
    try:
        return library.nvmlDeviceGetHandleByUUID(uuid)
    except library.NVMLError_NotFound:
        # The CUDA driver does not say that a device is a part of a GPU.
        return library.nvmlDeviceGetHandleByUUID(uuid.replace("GPU-", "MIG-", 1))
