"""Damaged headers of safetensors files: one line each, of a sane length, that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.common.errors import CheckpointError
from fastdeploy.weights.stored_tensors import INDEX_FILE, open_file, weight_files


def written(file: Path, header: bytes, body: bytes = bytes(16)) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return file


def entry(**changed: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changed}).encode()


def _read_all(file: Path) -> None:
    for tensor in open_file(file).tensors.values():
        tensor.require_floats()
        tensor.float32()


def message_of(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _read_all(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert message.isprintable()
    assert len(message) < 500 + len(str(file))
    return message


@pytest.mark.parametrize("header", [b"[" * 1000, b"[" * 100_000, b'{"a":' * 5000])
def test_a_header_that_is_nested_too_deep_is_one_line(tmp_path: Path, header: bytes) -> None:
    assert "nested too deep" in message_of(written(tmp_path / "f", header))


@pytest.mark.parametrize(
    "shape",
    [[-2, -2], [-1, -4], [4.9], ["4"], [True], [[4]], None, "4", {"4": 4}, [1e400], [1 << 63], [1] * 65],
    ids=str,
)
def test_invalid_shape_is_a_one_line_error(tmp_path: Path, shape: Any) -> None:
    message_of(written(tmp_path / "f", entry(shape=shape)))


@pytest.mark.parametrize("shape", [[0, 1 << 62], [0] * 64, [1 << 62, 0, 1 << 62]], ids=str)
def test_a_tensor_without_elements_has_no_bytes(tmp_path: Path, shape: list[int]) -> None:
    file = written(tmp_path / "f", entry(shape=shape, data_offsets=[0, 0]))
    if max(shape) == 0:
        assert open_file(file).tensors["a"].float32().size == 0
    else:
        assert "too many elements" in message_of(file)


@pytest.mark.parametrize(
    "offsets", [[0, 16.0], [-16, 0], [16, 0], [0, 1 << 70], [0], ["0", "16"], None, [0, 17]]
)
def test_invalid_offsets_are_a_one_line_error(tmp_path: Path, offsets: Any) -> None:
    message_of(written(tmp_path / "f", entry(data_offsets=offsets)))


@pytest.mark.parametrize("dtype", [None, 4, ["F32"], "X" * 90_000, "a\nb"], ids=lambda dtype: str(dtype)[:9])
def test_invalid_dtype_is_a_one_line_error(tmp_path: Path, dtype: Any) -> None:
    file = written(tmp_path / "f", entry(dtype=dtype))
    with pytest.raises(CheckpointError) as caught:
        _read_all(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500 + len(str(file))


@pytest.mark.parametrize("name", ["a\nb", "x" * 90_000, "\x1b[2J"], ids=["line end", "long", "escape"])
def test_a_strange_name_is_shown_in_one_line(tmp_path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [1] * 9000, "data_offsets": [0, 8]}}).encode()
    message_of(written(tmp_path / "f", header))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"weight_map": {"a": "' + "x/" * 50_000 + '"}}', "[]", "1e999"]
)
def test_a_damaged_index_is_one_line(tmp_path: Path, text: str) -> None:
    index = tmp_path / INDEX_FILE
    index.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        weight_files(tmp_path)
    assert str(caught.value).startswith(str(index))
    assert len(str(caught.value)) < 400 + len(str(index))
