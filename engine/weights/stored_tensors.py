"""The tensors of a checkpoint directory as they lie on disk, in one safetensors file or several."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import CheckpointError
from ..common.foreign_text import printable

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
#: The maximum of numpy.
_MAX_DIMENSIONS = 64
#: Raised by `json.loads` and by reading its result if a header is damaged.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
#: What weights can be stored as -> its view in numpy, which has no bfloat16.
_FLOATS = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a mapped file; nothing is read before its values are asked for."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    #: The bytes as they are on disk, which may begin at any address.
    data: np.ndarray

    def require_floats(self) -> None:
        """Raises CheckpointError if `float32` cannot be: what is quantised is not for this engine."""
        if self.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.file}: tensor {printable(self.name)} has dtype {printable(self.dtype)}; "
                "F32, BF16 and F16 can be loaded"
            )

    def float32(self, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """The values `start` to `stop` along `axis`: a view of the file, if that can be, or a copy.

        Raises:
            CheckpointError: some are not finite.
        """
        stored = self.data.view(_FLOATS[self.dtype]).reshape(self.shape)
        # Aligned, because other writers do not pad the header.
        values = np.require(stored[(slice(None),) * axis + (slice(start, stop),)], requirements=["C", "A"])
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.astype(np.float32, copy=False)
        if values.size and not np.isfinite([values.min(), values.max()]).all():
            raise CheckpointError(
                f"{self.file}: tensor {printable(self.name)} holds values that are not finite numbers"
            )
        return values


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A safetensors file: its tensors by name, and what it says about itself."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    #: What follows the header.
    body_bytes: int


def open_directory(path: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in directory `path`, by name.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        tensors |= open_file(file).tensors
    return tensors


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the checkpoint in directory `path`.

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
    """Maps a safetensors file; only the header is read.

    Raises:
        CheckpointError: it is no such file, or damaged.
    """
    try:
        with file.open("rb") as stream:
            # A private copy-on-write mapping: writable, as DLPack demands, and never written.
            mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be mapped ({error})") from None
    header_size = int.from_bytes(mapped[:8].tobytes(), "little")
    if len(mapped) < 8 or header_size > min(_MAX_HEADER, len(mapped) - 8):
        raise CheckpointError(
            f"{file}: not a safetensors file, or cut off (header {header_size} bytes, file {len(mapped)})"
        )
    try:
        header: dict[str, Any] = json.loads(mapped[8 : 8 + header_size].tobytes())
        metadata = {str(name): str(value) for name, value in (header.pop("__metadata__", None) or {}).items()}
        body = mapped[8 + header_size :]
        tensors = {name: _tensor(name, entry, file, body) for name, entry in header.items()}
        return StoredFile(tensors, metadata, len(body))
    except _DAMAGED as error:
        raise CheckpointError(f"{file}: the safetensors header is damaged ({_what(error)})") from None


def _shards(index: Path) -> set[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, *_DAMAGED) as error:
        raise CheckpointError(
            f"{index}: cannot be read as an index with a weight_map ({_what(error)})"
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
    # numpy counts the elements without regard to a size of 0.
    if math.prod(size or 1 for size in shape) >= 1 << 60:
        raise CheckpointError(f"{shown} has too many elements: {printable(list(shape))}")
    if begin > end or end - begin != math.prod(shape) * _ITEM_SIZE.get(dtype, end - begin):
        raise CheckpointError(
            f"{shown}: bytes {begin}..{end} do not hold {printable(dtype)} of shape {printable(list(shape))}"
        )
    if end > len(body):
        raise CheckpointError(f"{file}: cut off: tensor {printable(name)} ends at byte {end} of {len(body)}")
    return StoredTensor(name, file, dtype, shape, body[begin:end])


def _are_sizes(*numbers: object) -> bool:
    """Return True if all are integers that can count the bytes of a file or the elements of a tensor."""
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _what(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its values are nested too deep"
    return printable(repr(error))
