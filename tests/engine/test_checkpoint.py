"""Checkpoints in every layout, and the messages about invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from fastdeploy.common.errors import CheckpointError
from fastdeploy.config import ModelConfig
from fastdeploy.custom_ops.packed_matrix import FORMATS, interleave_gate_up, pack, to_bfloat16
from fastdeploy.device.paddle_weights import load_weights
from fastdeploy.models.ernie45 import MoEWeights
from fastdeploy.weights.weight_cache import Packing, packed_tensors
from tests.checkpoints import LAYOUTS, Tensors, config_json, draw_tensors, is_moe_layer, write_checkpoint


def blobs_of(path: Path, qkv_order: str = "plain", weight_format: str = "float32") -> dict[str, bytes]:
    """Return the data that the kernels and the embedding get."""
    found = packed_tensors(
        Packing(path, weight_format, qkv_order),
        ModelConfig.from_directory(path),
        lambda fraction, stage: None,
    )
    return {name: tensor.data.tobytes() for name, tensor in found.items() if not name.startswith("gap.")}


def assert_same(blobs: dict[str, bytes], others: dict[str, bytes]) -> None:
    assert list(blobs) == list(others)
    assert [name for name in blobs if blobs[name] != others[name]] == []


def expected_blobs(config: dict[str, Any], tensors: Tensors, weight_format: str) -> dict[str, bytes]:
    """Return the blobs of a checkpoint, computed directly from its tensors under Hugging Face names."""
    blobs: dict[str, bytes] = {}

    def matrix(name: str, *parts: str, form: str = weight_format) -> None:
        weights = np.concatenate([tensors[f"{part}.weight"] for part in parts])
        biased = f"{parts[0]}.bias" in tensors
        bias = np.concatenate([tensors[f"{part}.bias"] for part in parts]) if biased else None
        blobs[name] = pack(weights, bias, weight_format=form).tobytes()

    def mlp(name: str, parts: list[str]) -> None:
        gate, up, down = (
            np.stack([tensors[f"{part}.{kind}_proj.weight"] for part in parts])
            for kind in ("gate", "up", "down")
        )
        biases = down_bias = None
        if f"{parts[0]}.gate_proj.bias" in tensors:
            gate_bias, up_bias, down_bias = (
                tensors[f"{parts[0]}.{kind}_proj.bias"] for kind in ("gate", "up", "down")
            )
            biases = interleave_gate_up(gate_bias[:, None], up_bias[:, None])[:, 0]
        gate_up = interleave_gate_up(gate, up)
        blobs[f"{name}gate_up"] = pack(gate_up, biases, weight_format=weight_format).tobytes()
        blobs[f"{name}down"] = pack(down, down_bias, weight_format=weight_format).tobytes()

    words = tensors["model.embed_tokens.weight"]
    blobs["embedding"] = (words if weight_format == "float32" else to_bfloat16(words)).tobytes()
    for index in range(config["num_hidden_layers"]):
        layer, stored = f"layers.{index}.", f"model.layers.{index}."
        blobs[f"{layer}input_norm"] = tensors[f"{stored}input_layernorm.weight"].tobytes()
        matrix(f"{layer}qkv", *(f"{stored}self_attn.{kind}_proj" for kind in "qkv"))
        matrix(f"{layer}attention_output", f"{stored}self_attn.o_proj")
        blobs[f"{layer}post_attention_norm"] = tensors[f"{stored}post_attention_layernorm.weight"].tobytes()
        if not is_moe_layer(config, index):
            mlp(f"{layer}mlp.", [f"{stored}mlp"])
            continue
        matrix(f"{layer}mlp.router", f"{stored}mlp.gate", form="float32")
        correction = tensors[f"{stored}mlp.moe_statics.e_score_correction_bias"]
        blobs[f"{layer}mlp.correction_bias"] = correction.tobytes()
        mlp(f"{layer}mlp.experts.", [f"{stored}mlp.experts.{i}" for i in range(config["moe_num_experts"])])
        mlp(f"{layer}mlp.shared.", [f"{stored}mlp.shared_experts"])
    blobs["final_norm"] = tensors["model.norm.weight"].tobytes()
    matrix("lm_head", "lm_head")
    return blobs


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


@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_tensor_is_packed_in_its_place(
    checkpoint: Path, config: dict[str, Any], tensors: Tensors, weight_format: str
) -> None:
    assert_same(
        blobs_of(checkpoint, weight_format=weight_format), expected_blobs(config, tensors, weight_format)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, checkpoint: Path, config: dict[str, Any], tensors: Tensors, layout: str, shards: int
) -> None:
    write_checkpoint(tmp_path / "other", config, tensors, layout=layout, shards=shards)
    order = "grouped" if layout == "paddle-grouped" else "plain"
    assert_same(blobs_of(tmp_path / "other", order), blobs_of(checkpoint))


def test_the_order_inside_a_fused_qkv_tensor_matters(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors
) -> None:
    write_checkpoint(tmp_path, config, tensors, layout="paddle")
    plain, grouped = blobs_of(tmp_path, "plain"), blobs_of(tmp_path, "grouped")
    assert {name for name in plain if plain[name] != grouped[name]} == {f"layers.{i}.qkv" for i in range(3)}


def test_square_matrices_with_hugging_face_names_keep_that_orientation(tmp_path: Path) -> None:
    square = config_json(
        model_type="ernie4_5", hidden_size=32, head_dim=8, num_key_value_heads=4, intermediate_size=32
    )
    tensors = draw_tensors(square, seed=2)
    write_checkpoint(tmp_path / "square", square, tensors)
    write_checkpoint(tmp_path / "fused", square, tensors, layout="paddle")
    assert_same(blobs_of(tmp_path / "square"), blobs_of(tmp_path / "fused"))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_widened(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, layout: str, dtype: str
) -> None:
    """The values are multiples of 1/16 below 16, which either format holds exactly."""
    rounded = {name: (np.round(values * 16) / 16).astype(np.float32) for name, values in tensors.items()}
    write_checkpoint(tmp_path / "half", config, rounded, layout=layout, dtype=dtype)
    write_checkpoint(tmp_path / "wide", config, rounded)
    order = "grouped" if layout == "paddle-grouped" else "plain"
    assert_same(blobs_of(tmp_path / "half", order), blobs_of(tmp_path / "wide"))


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    config = config_json(tie_word_embeddings=True)
    tensors = draw_tensors(config, seed=4)
    write_checkpoint(tmp_path, config, tensors, layout="paddle")
    words = tensors["model.embed_tokens.weight"]
    assert (
        blobs_of(tmp_path, weight_format="wint4")["lm_head"] == pack(words, weight_format="wint4").tobytes()
    )


def test_weights_are_mapped_and_not_copied(checkpoint: Path) -> None:
    """The weights are pages of the packed file, which all replicas share."""
    config = ModelConfig.from_directory(checkpoint)
    weights = load_weights(
        checkpoint, config, weight_format="bfloat16", progress=lambda fraction, stage: None
    )
    layer = weights.layers[1]
    assert isinstance(layer.mlp, MoEWeights)
    tensors = [weights.embedding, weights.lm_head, weights.final_norm, layer.qkv, layer.mlp.router]
    tensors += [layer.mlp.correction_bias, layer.mlp.experts.gate_up, layer.mlp.experts.down]
    mapped = mappings_of(Packing(checkpoint, "bfloat16").file)
    for tensor in tensors:
        assert any(start <= tensor.data_ptr() < end for start, end in mapped)
        assert tensor.data_ptr() % 64 == 0
    assert weights.embedding.dtype == paddle.bfloat16
    assert list(weights.embedding.shape) == [config.vocab_size, config.hidden_size]
    assert list(layer.mlp.correction_bias.shape) == [config.moe_num_experts]


def mappings_of(file: Path) -> list[tuple[int, int]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(file)]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def test_tensors_at_odd_offsets_are_read_all_the_same(tmp_path: Path, checkpoint: Path) -> None:
    """Other writers do not pad the header to a multiple of eight."""
    raw = (checkpoint / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    other = tmp_path / "odd"
    other.mkdir()
    for file in checkpoint.glob("*.json"):
        (other / file.name).write_bytes(file.read_bytes())
    odd = (size + 1).to_bytes(8, "little") + raw[8 : 8 + size] + b" " + raw[8 + size :]
    (other / "model.safetensors").write_bytes(odd)
    assert_same(blobs_of(other), blobs_of(checkpoint))


def test_a_missing_correction_bias_is_zero_and_mtp_is_ignored(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors
) -> None:
    without = {name: values for name, values in tensors.items() if "moe_statics" not in name}
    zero = {name: values * ("moe_statics" not in name) for name, values in tensors.items()}
    write_checkpoint(tmp_path / "without", config, without)
    write_checkpoint(
        tmp_path / "zero", config, zero | {"model.mtp_block.0.norm.weight": np.ones(3, np.float32)}
    )
    without_bias, zero_bias = blobs_of(tmp_path / "without"), blobs_of(tmp_path / "zero")
    for index in (1, 2):
        # The multiplication by zero above may have produced negative zeros.
        name = f"layers.{index}.mlp.correction_bias"
        np.testing.assert_array_equal(
            np.frombuffer(without_bias.pop(name), np.float32), np.frombuffer(zero_bias.pop(name), np.float32)
        )
    assert list(without_bias) == list(zero_bias)


def test_progress_rises_to_one(checkpoint: Path) -> None:
    seen: list[float] = []
    for _ in ("packed", "found packed"):
        load_weights(
            checkpoint,
            ModelConfig.from_directory(checkpoint),
            weight_format="wint8",
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(checkpoint: Path, tensors: Tensors, value: float) -> None:
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    broken = tensors[name].copy()
    broken[7, 40] = value
    rewrite(checkpoint, {name: broken})
    assert f"tensor {name} contains values that are not finite" in message_of(checkpoint)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated: tensor "),
        (lambda raw: raw[:100], "truncated"),
        (lambda raw: raw[:5], "truncated"),
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
        blobs_of(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
