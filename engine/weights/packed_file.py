"""The file of packed weights: safetensors with page-aligned tensors, on whose mapping processes compute.

Any safetensors reader can open it. The format does not allow gaps, so alignment gaps are tensors named
``gap.N``. The metadata hold the origin of the file, the SHA-256 of all tensors, and the SHA-256 of the
header, computed with zeros in place of that checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import CheckpointError
from .stored_tensors import StoredFile, open_file

Bytes = np.ndarray
#: Produces some bytes of a tensor; called on any thread.
Piece = Callable[[], Bytes]

_ITEM_SIZE = {"U8": 1, "BF16": 2, "F32": 4}
_ALIGNMENT = 4096
_CHECKSUM = "sha256"
_HEADER_CHECKSUM = "header_sha256"
_ZEROS = "0" * 64
#: More threads would only wait for the writing thread and need more memory.
_MAX_THREADS = 8
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor to be written; its pieces produce its bytes in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Piece]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_SIZE[self.dtype]


def write(
    file: Path,
    tensors: Sequence[PackedTensor],
    metadata: dict[str, str],
    progress: Callable[[float, str], None],
) -> None:
    """Produce all pieces, write them to `file` and sync it to disk.

    Args:
        progress: called with the completed fraction and a description of the current stage; may raise.

    Raises:
        OSError: the file cannot be written.
    """
    sizes = [_rounded_up(tensor.nbytes) for tensor in tensors]
    header = _header(tensors, sizes, metadata, _ZEROS)
    with file.open("wb") as stream, closing(_made(tensors)) as made:
        # Fail now rather than after minutes if the disk has no room.
        os.posix_fallocate(stream.fileno(), 0, len(header) + sum(sizes))
        stream.write(header)
        digest = hashlib.sha256()
        for index, pieces in groupby(made, key=itemgetter(0)):
            gap = np.zeros(sizes[index] - tensors[index].nbytes, np.uint8)
            for _, piece in chain(pieces, [(index, gap)]):
                digest.update(piece.data)
                stream.write(piece.data)
            progress(sum(sizes[: index + 1]) / sum(sizes), f"packing {index + 1} of {len(tensors)}")
        stream.seek(0)
        stream.write(_header(tensors, sizes, metadata, digest.hexdigest()))
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path) -> StoredFile:
    """Map a file that `write` has written, of any version, without reading the tensors.

    Raises:
        CheckpointError: the header or the size of the file is wrong.
    """
    found = open_file(file)
    size = sum(len(tensor.data) for tensor in found.tensors.values())
    if _CHECKSUM not in found.metadata or size != found.body_bytes:
        raise CheckpointError(f"{file}: {found.body_bytes} bytes of tensors where the header lists {size}")
    return found


def check_header(file: Path, found: StoredFile) -> None:
    """Compare the header of a file returned by `read` with its checksum.

    Raises:
        CheckpointError: they differ.
    """
    expected = found.metadata.get(_HEADER_CHECKSUM, "")
    try:
        with file.open("rb") as stream:
            length = stream.read(8)
            header = length + stream.read(int.from_bytes(length, "little"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not expected or _header_digest(header.replace(expected.encode(), _ZEROS.encode())) != expected:
        raise CheckpointError(f"{file}: the SHA-256 of the header does not match")


def verify(file: Path, progress: Callable[[float], None]) -> None:
    """Compare the whole file with its checksums.

    Raises:
        CheckpointError: they differ, or the file cannot be read.
    """
    found = read(file)
    check_header(file, found)
    expected = found.metadata[_CHECKSUM]
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
            size = file.stat().st_size
            while block := stream.read(_READ_BYTES):
                digest.update(block)
                progress(stream.tell() / size)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{file}: damaged: SHA-256 is {digest.hexdigest()}, expected {expected}")


def _header(
    tensors: Sequence[PackedTensor], sizes: Sequence[int], metadata: dict[str, str], checksum: str
) -> bytes:
    checksums = {_CHECKSUM: checksum, _HEADER_CHECKSUM: _ZEROS}
    header = _render(tensors, sizes, metadata | checksums)
    return _render(tensors, sizes, metadata | checksums | {_HEADER_CHECKSUM: _header_digest(header)})


def _header_digest(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()


def _render(tensors: Sequence[PackedTensor], sizes: Sequence[int], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for index, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        end = start + tensor.nbytes
        entries[tensor.name] = _entry(tensor.dtype, tensor.shape, start, end)
        start += size
        if end < start:
            entries[f"gap.{index}"] = _entry("U8", (start - end,), end, start)
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = _rounded_up(8 + len(text)) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _made(tensors: Sequence[PackedTensor]) -> Generator[tuple[int, Bytes], None, None]:
    """Yield the index of a tensor and its bytes, piece by piece; threads produce a few pieces in advance."""
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    wanted = ((index, piece) for index, tensor in enumerate(tensors) for piece in tensor.pieces())
    ahead: deque[tuple[int, Future[Bytes]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
    try:
        for index, piece in wanted:
            ahead.append((index, pool.submit(piece)))
            if len(ahead) > 2 * threads:
                oldest, made = ahead.popleft()
                yield oldest, made.result()
        for oldest, made in ahead:
            yield oldest, made.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
