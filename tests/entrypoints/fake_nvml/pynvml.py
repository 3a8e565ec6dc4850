"""The surface of nvidia-ml-py that replicas use, without a driver. `state` says how it behaves."""

from __future__ import annotations

import threading
from types import SimpleNamespace

#: "works", "no driver", "lost", "hangs", "is partitioned" or "is another library".
state = "works"
#: Names of the functions that were called, in order.
calls: list[str] = []
_GPUS = {"GPU-1": "the handle", "MIG-2": "the handle"}


class NVMLError(Exception):
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


def nvmlInit() -> None:
    calls.append("nvmlInit")
    if state == "no driver":
        raise NVMLError("NVML Shared Library Not Found")
    if state == "is another library":
        raise AttributeError("module 'pynvml' has no attribute 'nvmlInit'")


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
    if uuid not in _GPUS:
        raise NVMLError_NotFound("Not Found")
    return _GPUS[uuid]


def nvmlDeviceGetMemoryInfo(handle: str) -> SimpleNamespace:
    calls.append("nvmlDeviceGetMemoryInfo")
    assert handle == "the handle"
    if state == "lost":
        raise NVMLError("GPU is lost")
    if state == "hangs":
        threading.Event().wait()
    return SimpleNamespace(total=150_000_000_000, used=45_000_000_000, free=105_000_000_000)


def nvmlDeviceGetUtilizationRates(handle: str) -> SimpleNamespace:
    assert handle == "the handle"
    if state == "is partitioned":
        raise NVMLError_NotSupported("Not Supported")
    return SimpleNamespace(gpu=37, memory=20)
