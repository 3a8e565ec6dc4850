"""Sizes in the layouts of a device, which its library computes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .cuda_library import CudaLibrary, Info

#: Alignment of what is laid out one after the other in an arena.
_ALIGNMENT = 256
_MOST_ALIGNED = 64


@dataclass(frozen=True, slots=True)
class KernelSizes:
    #: (outputs, inputs) -> bytes
    matrix: Callable[[int, int], int]
    #: (experts, inputs) -> bytes
    router: Callable[[int, int], int]
    #: (rows, width) -> bytes
    activations: Callable[[int, int], int]
    #: (kv heads, head_dim) -> bytes of the keys, or of the values, of one layer and block
    cache_block: Callable[[int, int], int]
    #: (segments, kv heads, head_dim) -> bytes
    attention_work: Callable[[int, int, int], int]
    #: (tokens, k, experts) -> rows, with each expert's padding
    expert_rows: Callable[[int, int, int], int]
    #: vocabulary -> bytes of a row
    draw_work: Callable[[int], int]
    #: Bytes of an element of the embedding.
    table_element: int = 2
    #: Bytes of a value between two operations: of qkv and of the experts' results.
    value: int = 2
    #: Matrices hold their biases, which otherwise lie behind them.
    biases_in_matrices: bool = False


def sizes_of(library: CudaLibrary, device: int, weight_format: str) -> KernelSizes:
    """Return the sizes of an opened device."""
    info = Info()
    library.call("fd_info", device, ctypes.byref(info))

    def expert_rows(capacity: int, k: int, experts: int) -> int:
        tile = library.value("fd_tile", capacity * k, experts)
        alignment = min(_MOST_ALIGNED, library.value("fd_tile_tokens", tile))
        return library.value("fd_expert_rows", capacity, k, experts, alignment)

    return KernelSizes(
        matrix=partial(library.value, "fd_matrix_bytes", device),
        router=partial(library.value, "fd_router_bytes"),
        activations=partial(library.value, "fd_activation_bytes"),
        cache_block=partial(library.value, "fd_cache_bytes", device, 1),
        attention_work=partial(library.value, "fd_attention_work_bytes"),
        expert_rows=expert_rows,
        draw_work=partial(library.value, "fd_draw_work_bytes"),
        table_element=4 if weight_format == "float32" else 2,
        value=info.value_bytes,
        biases_in_matrices=info.biases_in_matrices != 0,
    )


def aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
