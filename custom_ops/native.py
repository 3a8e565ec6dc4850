"""Loads the compiled library of operations into Paddle and configures its threads.

Paddle is imported with the library, on first use: a process that computes on a GPU needs neither.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import paddle


def run(operation: str, *arguments: Any) -> list[paddle.Tensor]:
    """Call the operation `fd_<operation>` with its tensors (None for an absent optional one) and attributes.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    return _caller()(f"fd_{operation}", *arguments)


def set_threads(count: int, cpus: Sequence[int] | None = None) -> None:
    """Run operations on `count` threads including the caller, pinned to `cpus` if given.

    Results do not depend on the number of threads.

    Raises:
        OSError: the threads cannot be started.
    """
    assert count >= 1
    assert cpus is None or len(cpus) == count, "one CPU per thread"
    error = library().fd_set_threads(count, None if cpus is None else (ctypes.c_int * count)(*cpus))
    if error is not None:
        raise OSError(f"--threads {count}: cannot start that many threads ({error.decode()})")


def instruction_set() -> str:
    """Return the instruction set in use: amx, avx512, avx2 or generic. FD_ISA may select an older one."""
    return library().fd_isa().decode()


def numeric_version() -> str:
    """Return the version of the arithmetic, such as "cpu-1-amx": the same one means the same bits."""
    return f"cpu-{library().fd_numeric_version()}-{instruction_set()}"


@cache
def _caller() -> Callable[..., list[paddle.Tensor]]:
    import paddle

    library()
    call: Callable[..., list[paddle.Tensor]] = paddle._C_ops._run_custom_op
    return call


@cache
def library() -> ctypes.CDLL:
    """Return the library, loaded on the first call.

    Raises:
        ImportError: it is missing, was compiled for another Paddle, or FD_ISA is invalid.
    """
    import paddle
    from paddle.base.core import load_op_meta_info_and_register_op

    path = Path(__file__).with_name("libfd_ops.so")
    if not path.exists():
        raise ImportError(f"{path} is missing; install the project with pip, which compiles it")
    try:
        load_op_meta_info_and_register_op(str(path))
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"{path} cannot be loaded into Paddle {paddle.__version__}; it was compiled for another version: "
            f"reinstall the project ({str(error).strip().splitlines()[-1]})"
        ) from None
    loaded.fd_set_threads.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    loaded.fd_set_threads.restype = ctypes.c_char_p
    loaded.fd_numeric_version.argtypes = []
    for name in ("fd_isa", "fd_isa_error"):
        getattr(loaded, name).argtypes = []
        getattr(loaded, name).restype = ctypes.c_char_p
    unfit = loaded.fd_isa_error()
    if unfit is not None:
        raise ImportError(unfit.decode())
    return loaded
