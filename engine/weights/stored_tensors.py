"""Reads the safetensors files of a checkpoint directory."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import CheckpointError
from ..common.foreign_text import parse_json, printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_ITEM_SIZE |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_MAX_HEADER = 100 << 20
#: NumPy's maximum.
_MAX_DIMENSIONS = 64
#: Exceptions that a damaged header causes while it is parsed and read.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
#: Supported dtypes of weights -> NumPy dtype of the view; NumPy has no bfloat16.
_FLOATS = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a mapped file; its values are read on demand."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    #: The stored bytes, not necessarily aligned.
    data: np.ndarray

    def require_floats(self) -> None:
        """Raise CheckpointError if `float32` does not support the dtype, as in quantised checkpoints."""
        if self.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.file}: tensor {printable(self.name)} has dtype {printable(self.dtype)}; "
                "F32, BF16 and F16 can be loaded"
            )

    def float32(self, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """Return the values `start` to `stop` along `axis`, as a view of the file if possible.

        Raises:
            CheckpointError: a value is not finite.
        """
        stored = self.data.view(_FLOATS[self.dtype]).reshape(self.shape)
        # Writers may leave tensors unaligned.
        values = np.require(stored[(slice(None),) * axis + (slice(start, stop),)], requirements=["C", "A"])
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.astype(np.float32, copy=False)
        if values.size and not np.isfinite([values.min(), values.max()]).all():
            raise CheckpointError(
                f"{self.file}: tensor {printable(self.name)} contains values that are not finite numbers"
            )
        return values


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A mapped safetensors file."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    #: Bytes after the header.
    body_bytes: int


def open_directory(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of the checkpoint in directory `path` by name.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        tensors |= open_file(file).tensors
    return tensors


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of the checkpoint in directory `path`.

    Raises:
        CheckpointError: there are none, or the index is damaged.
    """
    index = path / INDEX_FILE
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    if not index.exists():
        raise CheckpointError(f"{path}: no weights; expected {SINGLE_FILE} or {INDEX_FILE}")
    return [path / shard for shard in sorted(_shards(index))]


def open_file(file: Path) -> StoredFile:
    """Map a safetensors file and read its header.

    Raises:
        CheckpointError: it is not a safetensors file, or damaged.
    """
    try:
        with file.open("rb") as stream:
            # Copy-on-write: DLPack requires writable memory, although it is never written.
            mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be mapped ({error})") from None
    header_size = int.from_bytes(mapped[:8].tobytes(), "little")
    if len(mapped) < 8 or header_size > min(_MAX_HEADER, len(mapped) - 8):
        raise CheckpointError(
            f"{file}: not a safetensors file, or truncated (header {header_size} bytes, file {len(mapped)})"
        )
    try:
        header: dict[str, Any] = parse_json(mapped[8 : 8 + header_size].tobytes())
        metadata = {str(name): str(value) for name, value in (header.pop("__metadata__", None) or {}).items()}
        body = mapped[8 + header_size :]
        tensors = {name: _tensor(name, entry, file, body) for name, entry in header.items()}
        return StoredFile(tensors, metadata, len(body))
    except _DAMAGED as error:
        raise CheckpointError(
            f"{file}: the safetensors header is damaged ({printable(repr(error))})"
        ) from None


def _shards(index: Path) -> set[str]:
    try:
        shards = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, *_DAMAGED) as error:
        raise CheckpointError(
            f"{index}: cannot be read as an index with a weight_map ({printable(repr(error))})"
        ) from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: weight_map names '{printable(shard)}'; it must be a file beside the index"
            )
    return shards


def _tensor(name: str, entry: dict[str, Any], file: Path, body: np.ndarray) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype, sizes = entry["dtype"], entry["shape"]
    shown = f"{file}: tensor {printable(name)}"
    if not isinstance(dtype, str) or not isinstance(sizes, list) or not _are_sizes(begin, end, *sizes):
        raise CheckpointError(f"{shown}: its dtype, shape or data_offsets are damaged")
    shape = tuple(sizes)
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{shown} has {len(shape)} dimensions; at most {_MAX_DIMENSIONS} can be loaded")
    # NumPy's limit ignores dimensions of size 0.
    if math.prod(size or 1 for size in shape) >= 1 << 60:
        raise CheckpointError(f"{shown} has too many elements: {printable(list(shape))}")
    if begin > end or end - begin != math.prod(shape) * _ITEM_SIZE.get(dtype, end - begin):
        raise CheckpointError(
            f"{shown}: bytes {begin}..{end} do not hold {printable(dtype)} of shape {printable(list(shape))}"
        )
    if end > len(body):
        raise CheckpointError(
            f"{file}: truncated: tensor {printable(name)} ends at byte {end} of {len(body)}"
        )
    return StoredTensor(name, file, dtype, shape, body[begin:end])


def _are_sizes(*numbers: object) -> bool:
    """Return True if all are valid file offsets or dimensions."""
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
