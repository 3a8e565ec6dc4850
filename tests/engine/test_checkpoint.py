"""Checkpoints in every layout, and what a person reads when one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdeploy.checkpoint import load_weights
from fastdeploy.config import ModelConfig
from fastdeploy.errors import CheckpointError
from tests.checkpoints import LAYOUTS, Tensors, config_json, draw_tensors, write_checkpoint
from tests.network import Network

PROMPT = [5, 17, 80, 3, 44, 45, 9]


def logits_of(path: Path, qkv_order: str = "plain") -> np.ndarray:
    network = Network(path, qkv_order=qkv_order)
    return network.prefill(network.sequence(PROMPT))


def load(path: Path) -> None:
    load_weights(path, ModelConfig.from_directory(path), progress=lambda fraction, stage: None)


@pytest.fixture
def config() -> dict[str, Any]:
    return config_json(use_bias=True, tie_word_embeddings=False)


@pytest.fixture
def tensors(config: dict[str, Any]) -> Tensors:
    return draw_tensors(config, seed=11)


@pytest.fixture
def checkpoint(tmp_path: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    write_checkpoint(tmp_path / "plain", config, tensors)
    return tmp_path / "plain"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_gives_the_same_logits(
    tmp_path: Path, checkpoint: Path, config: dict[str, Any], tensors: Tensors, layout: str, shards: int
) -> None:
    write_checkpoint(tmp_path / "other", config, tensors, layout=layout, shards=shards)
    order = "grouped" if layout == "paddle-grouped" else "plain"
    np.testing.assert_allclose(logits_of(tmp_path / "other", order), logits_of(checkpoint), atol=1e-5)


def test_the_order_inside_a_fused_qkv_tensor_matters(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors
) -> None:
    write_checkpoint(tmp_path, config, tensors, layout="paddle")
    assert np.abs(logits_of(tmp_path, "plain") - logits_of(tmp_path, "grouped")).max() > 0.1


def test_square_matrices_under_hugging_face_names_are_taken_as_hugging_face_has_them(tmp_path: Path) -> None:
    square = config_json(
        model_type="ernie4_5", hidden_size=32, head_dim=8, num_key_value_heads=4, intermediate_size=32
    )
    tensors = draw_tensors(square, seed=2)
    write_checkpoint(tmp_path / "square", square, tensors)
    write_checkpoint(tmp_path / "fused", square, tensors, layout="paddle")
    np.testing.assert_allclose(logits_of(tmp_path / "square"), logits_of(tmp_path / "fused"), atol=1e-5)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_widened(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, layout: str, dtype: str
) -> None:
    """Multiples of 1/16 below 16, which either format holds exactly."""
    rounded = {name: np.float32(np.round(values * 16) / 16) for name, values in tensors.items()}
    write_checkpoint(tmp_path / "half", config, rounded, layout=layout, dtype=dtype)
    write_checkpoint(tmp_path / "wide", config, rounded)
    order = "grouped" if layout == "paddle-grouped" else "plain"
    np.testing.assert_allclose(logits_of(tmp_path / "half", order), logits_of(tmp_path / "wide"), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_mapped_and_not_copied(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, layout: str
) -> None:
    """The matrices are pages of the file, which all replicas share."""
    write_checkpoint(tmp_path, config, tensors, layout=layout)
    weights = load_weights(
        tmp_path, ModelConfig.from_directory(tmp_path), progress=lambda fraction, stage: None
    )
    mapped = mappings_of(tmp_path / "model.safetensors")
    layer = weights.layers[1]
    matrices = [weights.embedding, *weights.lm_head.weights, *layer.qkv.weights, *layer.mlp.router.weights]
    for expert in layer.mlp.experts:
        matrices += [*expert.gate_up.weights, *expert.down.weights]
    assert all(any(start <= m.data_ptr() < end for start, end in mapped) for m in matrices)


def mappings_of(file: Path) -> list[tuple[int, int]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(file)]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def test_tensors_at_odd_offsets_are_read_all_the_same(
    tmp_path: Path, checkpoint: Path, config: dict[str, Any]
) -> None:
    """Other writers do not pad the header to a multiple of eight."""
    raw = (checkpoint / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for file in checkpoint.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    odd = (size + 1).to_bytes(8, "little") + raw[8 : 8 + size] + b" " + raw[8 + size :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    np.testing.assert_array_equal(logits_of(tmp_path), logits_of(checkpoint))


def test_a_missing_correction_bias_is_zero_and_mtp_is_ignored(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors
) -> None:
    without = {name: values for name, values in tensors.items() if "moe_statics" not in name}
    zero = {name: values * ("moe_statics" not in name) for name, values in tensors.items()}
    write_checkpoint(tmp_path / "without", config, without)
    write_checkpoint(
        tmp_path / "zero", config, zero | {"model.mtp_block.0.norm.weight": np.ones(3, np.float32)}
    )
    np.testing.assert_array_equal(logits_of(tmp_path / "without"), logits_of(tmp_path / "zero"))


def test_progress_rises_to_one(checkpoint: Path) -> None:
    seen: list[float] = []
    load_weights(
        checkpoint,
        ModelConfig.from_directory(checkpoint),
        progress=lambda fraction, stage: seen.append(fraction),
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1


def rewrite(path: Path, change: dict[str, np.ndarray | None]) -> None:
    tensors = load_file(path / "model.safetensors") | change
    save_file(
        {name: values for name, values in tensors.items() if values is not None}, path / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("model.norm.weight", None, ["is missing", "[48]"]),
        ("model.layers.2.self_attn.k_proj.weight", None, ["is missing", "[32, 48]"]),
        ("model.layers.1.mlp.experts.4.down_proj.weight", None, ["is missing", "[48, 24]"]),
        ("model.layers.0.mlp.up_proj.bias", None, ["is missing", "[80]"]),
        ("lm_head.weight", None, ["is missing", "[96, 48]"]),
        ("model.embed_tokens.weight", (95, 48), ["[95, 48]", "[96, 48]", "model.safetensors:"]),
        ("model.layers.2.mlp.gate.weight", (48, 6), ["[48, 6]", "[6, 48]"]),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", (48, 48), ["[48, 48]", "[24, 48]"]),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named_with_both_shapes(
    checkpoint: Path, name: str, values: tuple[int, ...] | None, words: list[str]
) -> None:
    rewrite(checkpoint, {name: None if values is None else np.zeros(values, np.float32)})
    message = message_of(checkpoint)
    for word in [name, str(checkpoint), *words]:
        assert word in message


def test_a_quantised_tensor_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, {"model.layers.0.mlp.up_proj.weight": np.zeros((80, 48), np.int8)})
    assert "model.layers.0.mlp.up_proj.weight has dtype I8" in message_of(checkpoint)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[: len(raw) // 2], "cut off: tensor "),
        (lambda raw: raw[:100], "cut off"),
        (lambda raw: raw[:5], "cut off"),
        (lambda raw: b"", "cannot be mapped"),
        (lambda raw: b"<html>an error page</html>" * 9, "not a safetensors file"),
        (lambda raw: raw[:8] + b"!" + raw[9:], "header is damaged"),
        (lambda raw: raw.replace(b'"F32"', b'"F16"', 1), "do not hold F16"),
    ],
)
def test_a_damaged_file_is_named(checkpoint: Path, damage: Any, words: str) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = message_of(checkpoint)
    assert words in message
    assert str(file) in message


def test_a_missing_shard_and_a_bad_index_are_named(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors
) -> None:
    write_checkpoint(tmp_path, config, tensors, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in message_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    assert "'../elsewhere.safetensors'; it must be a file beside the index" in message_of(tmp_path)
    index.write_text("[]")
    assert "weight_map" in message_of(tmp_path)
    index.unlink()
    assert "no weights; expected model.safetensors or model.safetensors.index.json" in message_of(tmp_path)


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
