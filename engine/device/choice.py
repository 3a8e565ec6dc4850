"""Chooses the device of a replica. Asks the driver for GPUs without opening one."""

from __future__ import annotations

import ctypes
import logging
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import ConfigError
from ..config import EngineConfig, ModelConfig
from .cuda_library import NOT_BUILT, CudaLibrary, find_library, given_library
from .cuda_limits import unsupported, unsupported_on_cpu

_log = logging.getLogger(__name__)

_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76
#: Compute capability of H100, H200 and H20, for which the kernels are built.
_HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that the driver shows to this process."""

    #: Among the visible ones: an index into CUDA_VISIBLE_DEVICES.
    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    #: Replicas that share it, this one included.
    num_replicas: int = 1
    #: Name for other libraries of the driver, such as "GPU-..."; empty if the driver does not tell.
    uuid: str = ""
    #: PCI address, as in the kernel's log: "0000:1b:00.0"; empty if the driver does not tell.
    pci_address: str = ""
    #: It is the CPU, through libfd_cpu.so.
    is_cpu: bool = False


def choose_gpu(config: EngineConfig, model_config: ModelConfig) -> Gpu | None:
    """Return the GPU of this replica, or None for the CPU.

    With --device auto a GPU that cannot be used is named in the log, with the reason.

    Raises:
        ConfigError: --device gpu, and there is none that can be used; or $FD_CUDA_LIBRARY is libfd_cpu.so,
            which does not support the model or an option.
    """
    if config.device == "cpu":
        return None
    reason: str | None
    given = given_library()
    if given is not None and _is_for_cpus(given):
        reason = unsupported_on_cpu(config, model_config)
        if reason is not None:
            raise ConfigError(f"{given}: {reason}; without FD_CUDA_LIBRARY, --device cpu computes it")
        return Gpu(0, "the CPU", (0, 0), is_cpu=True)
    try:
        gpus = visible_gpus()
    except OSError as error:
        reason = str(error)
    else:
        if not gpus and config.device == "auto":
            return None
        gpu = deal(config, gpus) if gpus else None
        reason = (
            f"the driver shows no GPU ({_DRIVER})" if gpu is None else _unusable(config, model_config, gpu)
        )
        if reason is None:
            return gpu
    if config.device == "gpu":
        raise ConfigError(f"--device is 'gpu', but {reason}; use --device cpu or auto to compute on the CPU")
    _log.warning("--device auto computes on the CPU: %s", reason)
    return None


def _is_for_cpus(library: Path) -> bool:
    """Return True for a library that computes on the CPU and needs no driver."""
    try:
        return CudaLibrary(library).platform == "CPU"
    except ConfigError:
        # Reported where a GPU needs it.
        return False


def deal(config: EngineConfig, gpus: list[Gpu]) -> Gpu:
    """Return the GPU of this replica among those that all replicas see, and how many share it."""
    if config.replicas_per_gpu:
        # The launcher has chosen it.
        ordinal, shared_by = 0, config.replicas_per_gpu
    else:
        ordinal = config.data_parallel_rank % len(gpus)
        shared_by = len(range(ordinal, config.data_parallel_size, len(gpus)))
    return replace(gpus[ordinal], ordinal=ordinal, num_replicas=shared_by)


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that the driver shows to this process; none without a driver.

    Raises:
        OSError: there is a driver, and it does not work.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return []
    count = ctypes.c_int()
    status = driver.cuInit(0)
    if status == _NO_DEVICE:
        return []
    if status != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise OSError(f"the NVIDIA driver does not work ({(text.value or b'unknown error').decode()})")
    return [_gpu(driver, ordinal) for ordinal in range(count.value)]


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(64)
    driver.cuDeviceGet(ctypes.byref(handle), ordinal)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_MAJOR, handle)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_MINOR, handle)
    return Gpu(
        ordinal,
        name.value.decode(errors="replace"),
        (major.value, minor.value),
        uuid=_uuid(driver, handle),
        pci_address=_pci_address(driver, handle),
    )


def _uuid(driver: ctypes.CDLL, handle: ctypes.c_int) -> str:
    found = ctypes.create_string_buffer(16)
    # Older drivers lack the function.
    if not hasattr(driver, "cuDeviceGetUuid_v2") or driver.cuDeviceGetUuid_v2(found, handle) != 0:
        return ""
    return f"GPU-{uuid.UUID(bytes=found.raw)}"


def _pci_address(driver: ctypes.CDLL, handle: ctypes.c_int) -> str:
    found = ctypes.create_string_buffer(32)
    if driver.cuDeviceGetPCIBusId(found, len(found), handle) != 0:
        return ""
    return found.value.decode(errors="replace").lower()


def _unusable(config: EngineConfig, model_config: ModelConfig, gpu: Gpu) -> str | None:
    """Return why this GPU cannot be used, or None."""
    if gpu.compute_capability != _HOPPER:
        major, minor = gpu.compute_capability
        return (
            f"GPU {gpu.ordinal} is a {gpu.name} of compute capability {major}.{minor}; the kernels need 9.0 "
            "(H100, H200, H20)"
        )
    reason = unsupported(config, model_config)
    if reason is None and find_library() is None:
        return NOT_BUILT
    return reason
