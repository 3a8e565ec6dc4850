"""Weight files with arbitrary bytes give tensors within the file or a one-line error."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import CheckpointError
from fastdeploy.weights import packed_file
from fastdeploy.weights.stored_tensors import INDEX_FILE, open_directory, open_file

from .foreign import json_of, mutated, one_line

_DIRECTORY = tempfile.TemporaryDirectory()
_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
_INDEX = {"metadata": {}, "weight_map": {"a": "f", "b": "f"}}


def _directory() -> Path:
    return Path(_DIRECTORY.name)


@given(json_of(_HEADER), st.none() | st.integers(0, 2**64 - 1), st.integers(0, 40))
def test_a_safetensors_file_is_read_or_one_line(header: bytes, size: int | None, body: int) -> None:
    file = _directory() / "f"
    length = len(header) if size is None else size
    file.write_bytes(length.to_bytes(8, "little") + header + bytes(body))
    try:
        found = open_file(file)
        for tensor in found.tensors.values():
            assert tensor.data.nbytes <= body
            tensor.require_floats()
            assert tensor.float32().shape == tensor.shape
    except CheckpointError as error:
        one_line(str(error))


@given(json_of(_INDEX))
def test_an_index_of_shards_is_read_or_one_line(text: bytes) -> None:
    (_directory() / INDEX_FILE).write_bytes(text)
    try:
        open_directory(_directory())
    except CheckpointError as error:
        one_line(str(error))


@cache
def packed() -> bytes:
    def tensor(name: str, seed: int) -> packed_file.PackedTensor:
        values = np.random.default_rng(seed).integers(0, 256, 64, np.uint8)
        return packed_file.PackedTensor(name, "F32", (4, 4), lambda: [lambda: values])

    file = _directory() / "packed"
    packed_file.write(file, [tensor("a", 1), tensor("b", 2)], {"version": "1"}, lambda fraction, what: None)
    return file.read_bytes()


@given(st.data())
def test_every_change_of_a_packed_file_header_is_detected(data: st.DataObject) -> None:
    whole = packed()
    size = 8 + int.from_bytes(whole[:8], "little")
    used = len(whole[:size].rstrip())
    if data.draw(st.booleans()):
        changed = data.draw(mutated(whole[:used])) + whole[used:]
    else:
        header = json.loads(whole[8:size])
        text = data.draw(json_of(header))
        changed = whole[:8] + text.ljust(size - 8) + whole[size:]
    if changed == whole:
        return
    file = _directory() / "changed"
    file.write_bytes(changed)
    with pytest.raises(CheckpointError) as caught:
        packed_file.check_header(file, packed_file.read(file))
    one_line(str(caught.value))
