"""`fastdeploy collect-env`: versions, hardware and settings for a bug report, without secrets."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ... import __version__
from ...common import masking
from ...common.cli import CommandLine

_PACKAGE = "fd-dp"
#: Environment variables of this system and of the libraries that it uses.
_VARIABLES = re.compile(
    r"(FD|CUDA|NVIDIA|NCCL|OMP|KMP|MKL|OPENBLAS|OPENAI|OTEL|FLAGS|PADDLE|PYTHON|HTTPS?|NO|ALL)_|LD_LIBRARY_PATH|PATH",
    re.IGNORECASE,
)
_SECRETS = re.compile(r"key|token|secret|password|passwd|credential|auth|headers", re.IGNORECASE)
#: Instruction sets for which operations are compiled, and those beside them.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
_LIBRARIES = ("libfd_ops.so", "libfd_cpu.so", "libfd_cuda.so")


def main(words: Sequence[str]) -> int:
    CommandLine(
        prog="fastdeploy collect-env",
        description="Prints versions, hardware and settings for a bug report. Secrets are left out.",
        allow_abbrev=False,
    ).parse_args(words)
    for title, facts in (
        ("System", _system()),
        ("Processor", _processor()),
        ("GPU", _gpu()),
        ("Packages", _packages()),
        ("Libraries", _libraries()),
        ("Environment", environment(os.environ)),
    ):
        print(f"{title}:")
        for name, value in facts:
            print(f"  {name}: {value}")
    return 0


def environment(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the variables that matter here, with secrets replaced."""
    for name in sorted(variables):
        if _VARIABLES.match(name):
            value = "(set, not shown)" if _SECRETS.search(name) else masking.value(variables[name])
            yield name, value


def _system() -> Iterator[tuple[str, str]]:
    yield "fd-dp", __version__
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    with contextlib.suppress(OSError):
        yield "operating system", platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    yield "kernel", f"{platform.release()} {platform.machine()}"
    yield "C library", " ".join(platform.libc_ver())


def _processor() -> Iterator[tuple[str, str]]:
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
    yield "model", fields.get("model name", "unknown")
    yield "CPUs", f"{len(os.sched_getaffinity(0))} for this process of {os.cpu_count()}"
    flags = fields.get("flags", "").split()
    yield "instruction sets", " ".join(flag for flag in _FLAGS if flag in flags) or "none of those used here"
    memory = dict(
        re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    )
    yield "memory", " of ".join(f"{int(memory[key]) / 2**20:.1f} GiB" for key in ("MemAvailable", "MemTotal"))
    shared = shutil.disk_usage("/dev/shm")
    yield "/dev/shm", f"{shared.free / 2**30:.1f} GiB of {shared.total / 2**30:.1f} GiB"


def _gpu() -> Iterator[tuple[str, str]]:
    try:
        import pynvml
    except ImportError:
        yield "unknown", "pip install 'fd-dp[gpu]'"
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield "none", str(error)
        return
    yield "driver", pynvml.nvmlSystemGetDriverVersion()
    version = pynvml.nvmlSystemGetCudaDriverVersion()
    yield "CUDA of the driver", f"{version // 1000}.{version % 1000 // 10}"
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        yield f"GPU {index}", f"{name}, {memory.free / 2**30:.1f} GiB of {memory.total / 2**30:.1f} GiB"


def _packages() -> Iterator[tuple[str, str]]:
    """Yield the packages that the project requires, with and without extras, as far as they are installed."""
    try:
        required = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield _PACKAGE, "not installed"
        return
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in required} | {"setuptools", "pip"}
    for name in sorted(names - {_PACKAGE}):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if any(re.match(rf"{re.escape(name)}\b[^;]*$", line, re.IGNORECASE) for line in required):
                yield name, "missing"


def _libraries() -> Iterator[tuple[str, str]]:
    # Not imported, because that would load them.
    found = importlib.util.find_spec("fastdeploy.custom_ops")
    for folder in [] if found is None else found.submodule_search_locations or []:
        for name in _LIBRARIES:
            if (file := Path(folder) / name).exists():
                yield name, f"{file.stat().st_size >> 10} KiB"
    if nvcc := shutil.which("nvcc"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            told = subprocess.run(
                [nvcc, "--version"], capture_output=True, text=True, check=False, timeout=10
            )
            yield "nvcc", next(iter(re.findall(r"release ([\d.]+)", told.stdout)), "unknown")
