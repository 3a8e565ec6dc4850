"""The compiled library of operations: loaded into Paddle once, and told how many threads to use."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import paddle
from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op


def run(operation: str, *arguments: Any) -> list[paddle.Tensor]:
    """Calls the operation `fd_<operation>` with its tensors (None for an optional one), then its attributes.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    library()
    return paddle._C_ops._run_custom_op(f"fd_{operation}", *arguments)


def set_threads(count: int, cpus: Sequence[int] | None = None) -> None:
    """Lets operations run on `count` threads, the caller among them, each on its CPU if `cpus` are given.

    No result depends on the number of threads.

    Raises:
        OSError: the system does not let this process have so many.
    """
    assert count >= 1
    assert cpus is None or len(cpus) == count, "as many CPUs as threads"
    error = library().fd_set_threads(count, None if cpus is None else (ctypes.c_int * count)(*cpus))
    if error is not None:
        raise OSError(f"--threads {count}: the system refuses to start them ({error.decode()})")


def instruction_set() -> str:
    """What the kernels run on: amx, avx512, avx2 or generic; FD_ISA in the environment asks for less."""
    return library().fd_isa().decode()


@cache
def library() -> ctypes.CDLL:
    path = Path(__file__).with_name("libfd_ops.so")
    if not path.exists():
        raise ImportError(f"{path} is missing; install the project with pip, which compiles it")
    try:
        load_op_meta_info_and_register_op(str(path))
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"{path} does not load into Paddle {paddle.__version__}; it was compiled for another version: "
            f"install the project again ({str(error).strip().splitlines()[-1]})"
        ) from None
    loaded.fd_set_threads.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    loaded.fd_set_threads.restype = ctypes.c_char_p
    for name in ("fd_isa", "fd_isa_error"):
        getattr(loaded, name).argtypes = []
        getattr(loaded, name).restype = ctypes.c_char_p
    unfit = loaded.fd_isa_error()
    if unfit is not None:
        raise ImportError(unfit.decode())
    return loaded
