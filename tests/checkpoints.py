"""Random ERNIE-4.5 checkpoints, drawn from a seed and written in either layout. Needs numpy only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

LAYOUTS = ("huggingface", "paddle", "paddle-grouped", "paddle-split")


def config_json(**changes: Any) -> dict[str, Any]:
    """Return a tiny mixture-of-experts configuration with every key that transformers reads."""
    config: dict[str, Any] = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "vocab_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_bias": False,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config |= changes
    if config["model_type"] == "ernie4_5":
        config["architectures"] = ["Ernie4_5ForCausalLM"]
        config = {key: value for key, value in config.items() if not key.startswith("moe_")}
    return config


def draw_tensors(config: dict[str, Any], seed: int) -> Tensors:
    """Return the tensors of a whole checkpoint under Hugging Face names, each [out, in].

    numpy's RandomState is frozen: the same seed gives the same tensors in every version of numpy.
    """
    random = np.random.RandomState(seed)
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors: Tensors = {}

    def vector(name: str, size: int, centre: float, spread: float) -> None:
        tensors[name] = (centre + spread * random.standard_normal(size)).astype(np.float32)

    def matrix(name: str, outputs: int, inputs: int, *, bias: bool = False, gain: float = 1.0) -> None:
        values = gain / np.sqrt(inputs) * random.standard_normal((outputs, inputs))
        tensors[f"{name}.weight"] = values.astype(np.float32)
        if bias:
            vector(f"{name}.bias", outputs, 0, 0.3)

    def mlp(name: str, width: int, *, bias: bool) -> None:
        matrix(f"{name}.gate_proj", width, hidden, bias=bias, gain=1.5)
        matrix(f"{name}.up_proj", width, hidden, bias=bias)
        matrix(f"{name}.down_proj", hidden, width, bias=bias)

    bias = config["use_bias"]
    matrix("model.embed_tokens", config["vocab_size"], hidden, gain=0.3 * np.sqrt(hidden))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        vector(f"{layer}.input_layernorm.weight", hidden, 1, 0.2)
        vector(f"{layer}.post_attention_layernorm.weight", hidden, 1, 0.2)
        matrix(f"{layer}.self_attn.q_proj", queries, hidden, bias=bias, gain=2)
        matrix(f"{layer}.self_attn.k_proj", keys, hidden, bias=bias, gain=2)
        matrix(f"{layer}.self_attn.v_proj", keys, hidden, bias=bias)
        matrix(f"{layer}.self_attn.o_proj", hidden, queries, bias=bias)
        if not is_moe_layer(config, index):
            mlp(f"{layer}.mlp", config["intermediate_size"], bias=bias)
            continue
        experts, shared = config["moe_num_experts"], config["moe_num_shared_experts"]
        matrix(f"{layer}.mlp.gate", experts, hidden, gain=1.5)
        correction = 0.1 * random.standard_normal((1, experts))
        tensors[f"{layer}.mlp.moe_statics.e_score_correction_bias"] = correction.astype(np.float32)
        for expert in range(experts):
            mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"], bias=False)
        if shared:
            mlp(f"{layer}.mlp.shared_experts", config["moe_intermediate_size"] * shared, bias=bias)
    vector("model.norm.weight", hidden, 1, 0.2)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden)
    # In transformers the mixture of experts has a bias there, and the dense model has none.
    if bias and "moe_k" in config:
        vector("lm_head.bias", config["vocab_size"], 0, 0.3)
    return tensors


def is_moe_layer(config: dict[str, Any], index: int) -> bool:
    if "moe_k" not in config:
        return False
    end = config["moe_layer_end_index"]
    return (index + 1) % config["moe_layer_interval"] == 0 and (
        config["moe_layer_start_index"] <= index <= (config["num_hidden_layers"] - 1 if end == -1 else end)
    )


def paddle_layout(config: dict[str, Any], tensors: Tensors, *, split: bool, grouped: bool) -> Tensors:
    """Return the weights as in Paddle's checkpoints: [in, out], and fused unless `split`."""
    result: Tensors = {}
    prefix = "model." if split else "ernie."
    for name, values in tensors.items():
        renamed = name.replace("model.", prefix, 1)
        is_matrix = values.ndim == 2 and not name.endswith(("embed_tokens.weight", "correction_bias"))
        if split or not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            result[renamed] = values.T if is_matrix else values
        elif "q_proj" in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            if grouped:
                heads, head = config["num_key_value_heads"], config["head_dim"]
                parts = [part.reshape(heads, -1, head, *part.shape[1:]) for part in parts]
                fused = np.concatenate(parts, axis=1).reshape(-1, *values.shape[1:])
            else:
                fused = np.concatenate(parts)
            result[renamed.replace("q_proj", "qkv_proj")] = fused.T
        elif "gate_proj" in name:
            fused = np.concatenate([values, tensors[name.replace("gate_proj", "up_proj")]])
            result[renamed.replace("gate_proj", "up_gate_proj")] = fused.T
    return result


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    *,
    layout: str = "huggingface",
    dtype: str = "F32",
    shards: int = 1,
) -> None:
    """Write `tensors`, which have Hugging Face names, in `layout`, which is one of LAYOUTS."""
    if layout != "huggingface":
        tensors = paddle_layout(
            config, tensors, split=layout == "paddle-split", grouped=layout == "paddle-grouped"
        )
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors, dtype)
        return
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        write_safetensors(
            path / file, {name: tensors[name] for name in tensors if files[name] == file}, dtype
        )
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_safetensors(file: Path, tensors: Tensors, dtype: str = "F32") -> None:
    """Write the file by hand, because numpy has no bfloat16 for the library. BF16 truncates."""
    header: dict[str, Any] = {}
    body: list[bytes] = []
    end = 0
    for name, values in tensors.items():
        plain = np.ascontiguousarray(values)
        if dtype == "BF16":
            plain = (plain.view(np.uint32) >> 16).astype(np.uint16)
        elif dtype == "F16":
            plain = plain.astype(np.float16)
        body.append(plain.tobytes())
        start, end = end, end + len(body[-1])
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(body))
