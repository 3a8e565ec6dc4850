"""Converts SmolLM2-135M-Instruct (a Llama, as a quantised GGUF file) to an ERNIE-4.5 MoE checkpoint.

Attention, norms and embeddings are copied: GGUF stores query and key rows in the interleaved order of ERNIE's
rotary embedding. The MLPs become experts without changing the computed function. SwiGLU is a sum over
neurons,

    y = sum_j down[:, j] * silu(gate_j . x) * (up_j . x),

so any partition of the neurons gives y as a sum of smaller MLPs. Some neurons form the shared expert, whose
output ERNIE adds unscaled. The others form R routed experts with `down` multiplied by R, because ERNIE's
router weights the R selected experts by 1/R if their scores are equal.

Equal scores would always select the same experts. Each routed expert is therefore stored twice, with router
rows +g and -g. One of the two scores is positive and one negative, so the top R of the 2R experts contain one
copy of each pair. The selected copy depends on the token, as in a real mixture of experts, and the function
changes only by a term of the order of |g . x|.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import gguf
import gguf.quants
import numpy as np
from numpy.typing import NDArray

ROUTED_EXPERTS = 8  # distinct; each is stored twice
SHARED_EXPERTS = 4
#: Typical |g . x| of a router row for a normalised x.
MIRROR = 3e-4
#: Layers before this one are dense, as in the released ERNIE-4.5 models.
FIRST_MOE_LAYER = 1

#: Default system message of the original template, and its replacement.
ORIGINAL_SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SYSTEM_MESSAGE = "You are a helpful assistant."

Array = NDArray[np.float32]


def convert(source: Path, target: Path, report: Callable[[float], None]) -> None:
    """Write the checkpoint to the empty directory `target`; `report` gets the completed fraction."""
    model = _Gguf(source)
    layers = model["llama.block_count"]
    with SafetensorsFile(target / "model.safetensors") as file:
        file.add("model.embed_tokens.weight", model.tensor("token_embd.weight"))
        rng = np.random.default_rng(0)
        for layer in range(layers):
            for name, value in _layer_tensors(model, layer, rng):
                file.add(f"model.layers.{layer}.{name}", value)
            report((layer + 1) / layers)
        file.add("model.norm.weight", model.tensor("output_norm.weight"))
    _write_json(target / "config.json", _config(model))
    _write_json(target / "generation_config.json", _generation_config(model))
    _write_json(target / "tokenizer.json", _tokenizer(model))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(model))
    template = model["tokenizer.chat_template"]
    assert ORIGINAL_SYSTEM_MESSAGE in template
    (target / "chat_template.jinja").write_text(
        template.replace(ORIGINAL_SYSTEM_MESSAGE, SYSTEM_MESSAGE), encoding="utf-8"
    )


def experts_of(
    gate: Array, up: Array, down: Array, norm: Array, rng: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of an ERNIE-4.5 MoE layer that is equivalent to a dense SwiGLU MLP.

    In file order: tensors that the engine packs together (gate and up of all experts of a layer; down of all)
    are adjacent.

    Args:
        gate, up: [neurons, hidden].
        down: [hidden, neurons].
        norm: [hidden], weight of the norm before the MLP, which determines the length of x.
    """
    neurons, hidden = gate.shape
    size = neurons // (ROUTED_EXPERTS + SHARED_EXPERTS)
    assert size * (ROUTED_EXPERTS + SHARED_EXPERTS) == neurons, f"{neurons} neurons do not divide evenly"
    shared = size * SHARED_EXPERTS
    routed = [slice(shared + e * size, shared + (e + 1) * size) for e in range(ROUTED_EXPERTS)]

    row = rng.standard_normal((ROUTED_EXPERTS, hidden)).astype(np.float32)
    row *= MIRROR / np.linalg.norm(row * norm, axis=1, keepdims=True)
    yield "gate.weight", np.stack([row, -row], axis=1).reshape(2 * ROUTED_EXPERTS, hidden)
    yield "moe_statics.e_score_correction_bias", np.zeros((1, 2 * ROUTED_EXPERTS), np.float32)
    for e in range(2 * ROUTED_EXPERTS):
        yield f"experts.{e}.gate_proj.weight", gate[routed[e // 2]]
        yield f"experts.{e}.up_proj.weight", up[routed[e // 2]]
    for e in range(2 * ROUTED_EXPERTS):
        # Exact, because ROUTED_EXPERTS is a power of two.
        yield f"experts.{e}.down_proj.weight", down[:, routed[e // 2]] * np.float32(ROUTED_EXPERTS)
    yield "shared_experts.gate_proj.weight", gate[:shared]
    yield "shared_experts.up_proj.weight", up[:shared]
    yield "shared_experts.down_proj.weight", down[:, :shared]


class SafetensorsFile:
    """Writes float32 tensors one by one, and the header at the end.

    The library's own writer needs all tensors in memory and aligns them to 8 bytes. Here the data begin at a
    page and each tensor at a cache line, so that a mapped file can be used without copying.
    """

    _DATA_START = 512 * 1024
    _ALIGNMENT = 64

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._size = 0
        self._file: BinaryIO

    def __enter__(self) -> SafetensorsFile:
        self._file = self._path.open("wb")
        self._file.seek(self._DATA_START)
        return self

    def add(self, name: str, value: Array) -> None:
        value = np.ascontiguousarray(value, np.float32)
        # The format does not allow gaps between tensors.
        assert value.nbytes % self._ALIGNMENT == 0, f"{name} would leave the next tensor unaligned"
        self._file.write(value.data)
        end = self._size + value.nbytes
        self._header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [self._size, end]}
        self._size = end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if kind is None:
                length = self._DATA_START - 8
                header = json.dumps(self._header, separators=(",", ":")).encode()
                assert len(header) <= length, "the header is too large for its space"
                file.seek(0)
                file.write(length.to_bytes(8, "little") + header.ljust(length))
                file.flush()
                os.fsync(file.fileno())


class _Gguf:
    """A GGUF file: metadata by key, and tensors as float32 by name."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert "output.weight" not in self._tensors, "tied embeddings are expected"

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()

    def tensor(self, name: str) -> Array:
        tensor = self._tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def _layer_tensors(model: _Gguf, layer: int, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    def tensor(name: str) -> Array:
        return model.tensor(f"blk.{layer}.{name}.weight")

    yield "input_layernorm.weight", tensor("attn_norm")
    yield "self_attn.q_proj.weight", tensor("attn_q")
    yield "self_attn.k_proj.weight", tensor("attn_k")
    yield "self_attn.v_proj.weight", tensor("attn_v")
    yield "self_attn.o_proj.weight", tensor("attn_output")
    norm = tensor("ffn_norm")
    yield "post_attention_layernorm.weight", norm
    gate, up, down = tensor("ffn_gate"), tensor("ffn_up"), tensor("ffn_down")
    if layer < FIRST_MOE_LAYER:
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", down
        return
    for name, value in experts_of(gate, up, down, norm, rng):
        yield f"mlp.{name}", value


def _config(model: _Gguf) -> dict[str, Any]:
    hidden, heads = model["llama.embedding_length"], model["llama.attention.head_count"]
    neurons, layers = model["llama.feed_forward_length"], model["llama.block_count"]
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "vocab_size": len(model["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": model["llama.context_length"],
        # Stored as float32, 9.9999997e-06.
        "rms_norm_eps": float(f"{model['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(model["llama.rope.freq_base"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model["llama.rope.freq_base"])},
        "tie_word_embeddings": True,
        "use_bias": False,
        "use_cache": True,
        "moe_num_experts": 2 * ROUTED_EXPERTS,
        "moe_k": ROUTED_EXPERTS,
        "moe_intermediate_size": neurons // (ROUTED_EXPERTS + SHARED_EXPERTS),
        "moe_num_shared_experts": SHARED_EXPERTS,
        "moe_layer_start_index": FIRST_MOE_LAYER,
        "moe_layer_end_index": layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "dtype": "float32",
        "torch_dtype": "float32",
        **_special_ids(model),
    }


def _generation_config(model: _Gguf) -> dict[str, Any]:
    ids = _special_ids(model)
    # Id 0 is <|endoftext|>, which ended the texts in pre-training.
    return {**ids, "eos_token_id": [ids["eos_token_id"], 0], "do_sample": False}


def _special_ids(model: _Gguf) -> dict[str, int]:
    return {
        "bos_token_id": model["tokenizer.ggml.bos_token_id"],
        "eos_token_id": model["tokenizer.ggml.eos_token_id"],
        "pad_token_id": model["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(model: _Gguf) -> dict[str, Any]:
    """Return the byte-level BPE; the pre-tokenizer "smollm" splits off digits, then works like GPT-2's."""
    assert model["tokenizer.ggml.model"] == "gpt2"
    assert model["tokenizer.ggml.pre"] == "smollm"
    tokens = model["tokenizer.ggml.tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [
        {"id": i, "content": token, **flags}
        for i, (token, kind) in enumerate(zip(tokens, model["tokenizer.ggml.token_type"], strict=True))
        if kind == gguf.TokenType.CONTROL
    ]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in model["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(model: _Gguf) -> dict[str, Any]:
    tokens = model["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model["llama.context_length"],
        **{name: tokens[model[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()},
    }


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
