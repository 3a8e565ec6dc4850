"""libfd_cuda.so through its C interface, with torch's memory and stream."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(os.environ.get("FD_CUDA_LIBRARY", "build/cuda/libfd_cuda.so"))

BFLOAT16, FLOAT, ADD, SWIGLU = range(4)
PLAIN, GATE, UP = range(3)
SOURCE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class RetileArgs(ctypes.Structure):
    _fields_ = [
        ("source", c_void_p),
        ("source_type", c_int32),
        ("turn", c_int32),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
        ("rows", c_int32),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("first_row", c_int32),
        ("matrix", c_void_p),
    ]


class ProductArgs(ctypes.Structure):
    _fields_ = [
        ("weights", c_void_p),
        ("slots", c_void_p),
        ("tokens", c_void_p),
        ("counts", c_void_p),
        ("groups", c_int32),
        ("alignment", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("output", c_int32),
        ("capacity", c_int32),
        ("tile", c_int32),
        ("is_early", c_int32),
        ("bias", c_void_p),
        ("rows", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
    ]


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


P, I = c_void_p, c_int32  # noqa: E741
EmbeddingArgs = _structure(
    "EmbeddingArgs", step=P, table=P, vocabulary=I, width=I, hidden_states=P, drawn=P, capacity=I
)
NormArgs = _structure(
    "NormArgs", hidden_states=P, weight=P, rows=P, count=P, out=P, router=P, router_logits=P, expert_rows=P,
    epsilon=c_float, width=I, experts=I, capacity=I,
)  # fmt: skip
RotationArgs = _structure(
    "RotationArgs", step=P, rotary_cos_sin=P, slot_mapping=P, theta=c_float, head_dim=I, capacity=I
)
OpenArgs = _structure("OpenArgs", ordinal=I, type=I, block_size=I, threads=I, cpus=P)
AttentionArgs = _structure(
    "AttentionArgs", step=P, rotary_cos_sin=P, slot_mapping=P, qkv=P, keys=P, values=P, out=P, work=P,
    work_bytes=c_int64,
    heads=I, kv_heads=I, head_dim=I, capacity=I, has_prompts=I, reserved=I,
)  # fmt: skip
RouteArgs = _structure(
    "RouteArgs", logits=P, bias=P, count=P, x=P, topk_ids=P, topk_weights=P, counts=P, rows_in_expert=P,
    rows=P,
    assignments=P, norm_min=c_float, experts=I, k=I, width=I, alignment=I, capacity=I,
)  # fmt: skip
CombineArgs = _structure(
    "CombineArgs", results=P, topk_weights=P, shared=P, count=P, hidden_states=P, norm=P, normed=P,
    epsilon=c_float, k=I, width=I, capacity=I,
)  # fmt: skip
DrawArgs = _structure(
    "DrawArgs", logits=P, count=P, rows=P, tokens=P, drawn=P, top_tokens=P, logprobs=P, work=P,
    vocabulary=I, width=I, capacity=I,
)  # fmt: skip


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY.resolve()))
    library.fd_last_error.restype = ctypes.c_char_p
    library.fd_matrix_bytes.restype = c_int64
    library.fd_matrix_bytes.argtypes = [c_void_p, c_int32, c_int32]
    library.fd_cache_bytes.restype = c_int64
    library.fd_cache_bytes.argtypes = [c_void_p, c_int64, c_int32, c_int32]
    library.fd_attention_work_bytes.restype = c_int64
    library.fd_attention_work_bytes.argtypes = [c_int64, c_int32, c_int32]
    library.fd_expert_rows.restype = c_int64
    library.fd_draw_work_bytes.restype = c_int64
    library.fd_activation_bytes.restype = c_int64
    library.fd_activation_bytes.argtypes = [c_int64, c_int32]
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    if library.fd_prepare() != 0:
        raise RuntimeError(library.fd_last_error().decode())
    return library


_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    global _library
    if _library is None:
        _library = _load()
    return _library


def call(name: str, *args: ctypes.Structure) -> None:
    """Enqueue an operation on torch's current stream."""
    stream = c_void_p(torch.cuda.current_stream().cuda_stream)
    if getattr(library(), name)(stream, *map(ctypes.byref, args)) != 0:
        raise RuntimeError(library().fd_last_error().decode())


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def fill(structure: type[ctypes.Structure], **fields: Any) -> Any:
    """Return the structure with tensors replaced by their addresses; it keeps them alive."""
    values = {name: address(v) if isinstance(v, torch.Tensor) else v for name, v in fields.items()}
    filled = structure(**values)
    filled.tensors = fields
    return filled


# ---- the layouts of custom_ops/cuda/layout.h, in plain torch -------------------------------------------


def blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Return [rows / 64, columns / 64, 64, 64] swizzled blocks of a bfloat16 matrix of whole blocks."""
    rows, columns = matrix.shape
    pieces = matrix.reshape(rows // 64, 64, columns // 64, 8, 8).permute(0, 2, 1, 3, 4)
    row, place = torch.arange(64)[:, None], torch.arange(8)[None, :]
    swizzled = pieces[:, :, row, place ^ (row % 8)]
    return swizzled.reshape(rows // 64, columns // 64, 64, 64).contiguous()


def padded(matrix: torch.Tensor, rows: int, columns: int, value: float = 0.0) -> torch.Tensor:
    out = torch.full((rows, columns), value, dtype=matrix.dtype, device=matrix.device)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def activations(x: torch.Tensor, poison: float = float("nan")) -> torch.Tensor:
    """Return [T, K] bfloat16 as activations; rows that fill up a block hold `poison`."""
    columns = round_up(x.shape[1], 64)
    wide = padded(x, x.shape[0], columns)
    return blocks(padded(wide, round_up(max(x.shape[0], 1), 64), columns, poison))


def rows_of(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return [rows, columns] of activations [row block, column block, 64, 64]."""
    row, place = torch.arange(64)[:, None], torch.arange(8)[None, :]
    pieces = tiles.reshape(*tiles.shape[:2], 64, 8, 8)[:, :, row, place ^ (row % 8)]
    return pieces.permute(0, 2, 1, 3, 4).reshape(tiles.shape[0] * 64, -1)[:rows, :columns]


def tiled_matrix(weights: torch.Tensor) -> torch.Tensor:
    """Return [outputs, inputs] in the layout of a matrix."""
    outputs, inputs = weights.shape
    tiles = blocks(padded(weights, round_up(outputs, 128), round_up(inputs, 64)))
    return tiles.reshape(-1, 2, tiles.shape[1], 64, 64).transpose(1, 2).contiguous()


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return gate and up [width, inputs] in turns of eight rows."""
    return torch.stack([gate.reshape(-1, 8, gate.shape[1]), up.reshape(-1, 8, up.shape[1])], 1).flatten(0, 2)


def counts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Return random bfloat16 [rows, columns]."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, columns, device="cuda", generator=generator).bfloat16()


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative error of the whole; infinity if anything is not finite."""
    difference = (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-300)
    return float(difference) if torch.isfinite(out).all() else float("inf")


def product_args(
    weights: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor,
    outputs: int,
    inputs: int,
    output: int,
    capacity: int,
    tile: int | None = None,
    **rest: Any,
) -> Any:
    groups = counts.numel()
    if tile is None:
        tile = library().fd_tile(capacity, groups)
    fields: dict[str, Any] = {"alignment": 64, "out_stride": out.shape[-1], **rest}
    return fill(
        ProductArgs,
        weights=weights,
        tokens=tokens,
        counts=counts,
        groups=groups,
        outputs=outputs,
        inputs=inputs,
        output=output,
        capacity=capacity,
        tile=tile,
        out=out,
        **fields,
    )


def product(*arguments: Any, **fields: Any) -> None:
    """Enqueue a product; see `product_args`."""
    call("fd_product", product_args(*arguments, **fields))


def product_pair(dense: ctypes.Structure, grouped: ctypes.Structure) -> None:
    call("fd_product_pair", dense, grouped)
