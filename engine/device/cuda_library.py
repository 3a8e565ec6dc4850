"""libfd_cuda.so or libfd_cpu.so for ctypes: custom_ops/include/fd_device.h in Python."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, byref, c_char, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from .errors import DeviceBroken, OutOfDeviceMemory

_NAME = "libfd_cuda.so"
_VARIABLE = "FD_CUDA_LIBRARY"

OK, BAD_ARGUMENT, NO_MEMORY, BROKEN, NO_GRAPH = range(5)
ARENA_WEIGHTS, ARENA_CACHE, ARENA_WORK = range(3)
BEGIN_CAPTURE, END_CAPTURE, LAUNCH, FORGET_ALL = range(4)
FLOAT32, FLOAT16, BFLOAT16 = range(3)
PLAIN, GATE, UP, ROUTER, BIAS = range(5)
OUT_BFLOAT16, OUT_FLOAT, OUT_ADD, OUT_SWIGLU = range(4)


class Buffer(Structure):
    _fields_ = [("address", c_uint64), ("bytes", c_int64)]


class Info(Structure):
    _fields_ = [
        ("name", c_char * 64),
        ("numeric_version", c_char * 16),
        ("layout_version", c_int32),
        ("multiprocessors", c_int32),
        ("bytes_free", c_int64),
        ("bytes_total", c_int64),
        ("value_bytes", c_int32),
        ("biases_in_matrices", c_int32),
    ]


def _fields(text: str) -> list[tuple[str, Any]]:
    """Return the fields that `text` declares as in C: "p" is an address, "i" int32, "l" int64, "f" float."""
    kinds = {"p": c_void_p, "i": c_int32, "l": c_int64, "f": c_float}
    return [(name, kinds[kind]) for kind, name in (word.split(":") for word in text.split())]


class OpenArgs(Structure):
    _fields_ = _fields("i:ordinal i:type i:block_size i:threads p:cpus")


class RetileArgs(Structure):
    _fields_ = _fields(
        "p:source i:source_type i:turn l:row_stride l:column_stride i:rows i:inputs i:outputs i:first_row "
        "p:matrix"
    )


class ProductArgs(Structure):
    _fields_ = _fields(
        "p:weights p:slots p:tokens p:counts i:groups i:alignment i:outputs i:inputs i:output i:capacity "
        "i:tile i:is_early p:bias p:rows p:out l:out_stride"
    )


class EmbeddingArgs(Structure):
    _fields_ = _fields("p:step p:table i:vocabulary i:width p:hidden_states p:drawn i:capacity")


class NormArgs(Structure):
    _fields_ = _fields(
        "p:hidden_states p:weight p:rows p:count p:out p:router p:router_logits p:expert_rows f:epsilon "
        "i:width i:experts i:capacity"
    )


class RotationArgs(Structure):
    _fields_ = _fields("p:step p:rotary_cos_sin p:slot_mapping f:theta i:head_dim i:capacity")


class AttentionArgs(Structure):
    _fields_ = _fields(
        "p:step p:rotary_cos_sin p:slot_mapping p:qkv p:keys p:values p:out p:work l:work_bytes i:heads "
        "i:kv_heads i:head_dim i:capacity i:has_prompts i:reserved"
    )


class RouteArgs(Structure):
    _fields_ = _fields(
        "p:logits p:bias p:count p:x p:topk_ids p:topk_weights p:counts p:rows_in_expert p:rows "
        "p:assignments f:norm_min i:experts i:k i:width i:alignment i:capacity"
    )


class CombineArgs(Structure):
    _fields_ = _fields(
        "p:results p:topk_weights p:shared p:count p:hidden_states p:norm p:normed f:epsilon i:k i:width "
        "i:capacity"
    )


class DrawArgs(Structure):
    _fields_ = _fields(
        "p:logits p:count p:rows p:tokens p:drawn p:top_tokens p:logprobs p:work i:vocabulary i:width "
        "i:capacity"
    )


_INT_FUNCTIONS: dict[str, list[Any]] = {
    "fd_open": [POINTER(OpenArgs), POINTER(c_void_p)],
    "fd_info": [c_void_p, POINTER(Info)],
    "fd_arena": [c_void_p, c_int32, c_int64, POINTER(Buffer)],
    "fd_steps": [c_void_p, c_int64, c_int64, POINTER(Buffer), POINTER(Buffer)],
    "fd_step_begin": [c_void_p, c_void_p, c_int64, POINTER(c_uint64)],
    "fd_step_end": [c_void_p, c_uint64],
    "fd_step_wait": [c_void_p, c_uint64, POINTER(c_void_p)],
    "fd_graph": [c_void_p, c_int32, c_uint64],
    "fd_fork": [c_void_p],
    "fd_join": [c_void_p],
    "fd_fetch": [c_void_p, c_void_p, c_uint64, c_int64],
    "fd_product_pair": [c_void_p, c_void_p, c_void_p],
    "fd_upload_begin": [c_void_p],
    "fd_upload": [c_void_p, POINTER(RetileArgs), c_int32],
    "fd_upload_bytes": [c_void_p, c_uint64, c_void_p, c_int64],
    "fd_upload_finish": [c_void_p, POINTER(c_int32)],
    **{
        f"fd_{name}": [c_void_p, c_void_p]
        for name in ("product", "embedding", "norm", "rotation", "attention", "route", "combine", "draw")
    },
}
#: Functions whose result is a value: its type, and the types of the arguments.
_VALUES: dict[str, tuple[Any, list[Any]]] = {
    "fd_last_error": (ctypes.c_char_p, []),
    "fd_platform": (ctypes.c_char_p, []),
    "fd_close": (None, [c_void_p]),
    "fd_stream": (c_void_p, [c_void_p]),
    "fd_side_stream": (c_void_p, [c_void_p]),
    "fd_matrix_bytes": (c_int64, [c_void_p, c_int32, c_int32]),
    "fd_router_bytes": (c_int64, [c_int32, c_int32]),
    "fd_activation_bytes": (c_int64, [c_int64, c_int32]),
    "fd_cache_bytes": (c_int64, [c_void_p, c_int64, c_int32, c_int32]),
    "fd_tile": (c_int32, [c_int32, c_int32]),
    "fd_tile_tokens": (c_int32, [c_int32]),
    "fd_attention_work_bytes": (c_int64, [c_int64, c_int32, c_int32]),
    "fd_expert_rows": (c_int64, [c_int32, c_int32, c_int32, c_int32]),
    "fd_draw_work_bytes": (c_int64, [c_int32]),
}


#: Reason why no GPU can be used if `find_library` finds none.
NOT_BUILT = "libfd_cuda.so is not built; run make gpu, which needs nvcc"


def given_library() -> Path | None:
    """Return $FD_CUDA_LIBRARY. Tests name libfd_cpu.so, to run without a GPU what runs on one."""
    given = os.environ.get(_VARIABLE)
    return Path(given) if given else None


def find_library() -> Path | None:
    """Return $FD_CUDA_LIBRARY, or libfd_cuda.so beside the operations or in build/cuda of a checkout."""
    if (given := given_library()) is not None:
        return given
    from .. import custom_ops

    package = Path(custom_ops.__file__).resolve().parent
    for path in (package / _NAME, package.parent / "build/cuda" / _NAME):
        if path.exists():
            return path
    return None


class CudaLibrary:
    """The loaded library. Its functions raise instead of returning a status."""

    def __init__(self, path: Path, pci_address: str = "") -> None:
        """
        Args:
            pci_address: of the GPU that it is used for; named when it breaks, because the kernel's log does.

        Raises:
            ConfigError: it cannot be loaded.
        """
        self._place = f" (PCI {pci_address})" if pci_address else ""
        try:
            self._library = ctypes.CDLL(str(path.absolute()))
            for name, arguments in _INT_FUNCTIONS.items():
                getattr(self._library, name).argtypes = arguments
            for name, (result, arguments) in _VALUES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise ConfigError(f"{path}: cannot be loaded ({error}); run make gpu to build it") from None
        #: "GPU" or "CPU".
        self.platform: str = self._library.fd_platform().decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns an fd_status.

        Raises:
            OutOfDeviceMemory, DeviceBroken, ValueError: what went wrong, in one line.
        """
        status = getattr(self._library, name)(*arguments)
        if status == OK:
            return
        message = f"{self.platform}: {self._library.fd_last_error().decode(errors='replace')}"
        if status == NO_MEMORY:
            raise OutOfDeviceMemory(message)
        if status == BROKEN:
            raise DeviceBroken(message + self._place)
        raise ValueError(message)

    def value(self, name: str, *arguments: Any) -> int:
        """Call a function that returns a number or an address."""
        return int(getattr(self._library, name)(*arguments) or 0)

    def enqueue(self, name: str, stream: int, arguments: Structure) -> None:
        self.call(name, stream, byref(arguments))

    def close(self, device: int) -> None:
        self._library.fd_close(device)
