"""ERNIE-4.5 in plain numpy over whole texts: in float64, or rounded like a plain bfloat16 implementation.

The bfloat16 form rounds the result of each operation: projections, norms, activations, residuals, experts. It
keeps the router and the inside of a softmax in full precision, as torch does. It also keeps attention scores,
which eager torch rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastdeploy.custom_ops import packed_matrix, reference

from .checkpoints import Tensors, is_moe_layer

Rounding = Callable[[np.ndarray], np.ndarray]


def float64(values: np.ndarray) -> np.ndarray:
    return values


def bfloat16(values: np.ndarray) -> np.ndarray:
    bits = packed_matrix.to_bfloat16(values.astype(np.float32))
    return packed_matrix.from_bfloat16(bits).astype(np.float64)


def as_bfloat16_stores_them(tensors: Tensors) -> Tensors:
    """Return the tensors as read back from a checkpoint that `write_checkpoint` wrote in BF16."""
    return {name: (values.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, values in tensors.items()}


class ReferenceNetwork:
    """The network of `config` and `tensors` as `tests.checkpoints` draws them."""

    def __init__(self, config: dict[str, Any], tensors: Tensors, rounded: Rounding = float64) -> None:
        self._config = config
        self._tensors = {name: values.astype(np.float64) for name, values in tensors.items()}
        self._rounded = rounded

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits of all positions, [T, vocabulary]."""
        rounded, positions = self._rounded, np.arange(len(token_ids))
        rotary_cos_sin = reference.rotary_embedding(
            positions, self._config["rope_parameters"]["rope_theta"], self._config["head_dim"]
        )
        hidden_states = self._tensors["model.embed_tokens.weight"][list(token_ids)]
        for index in range(self._config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            x = self._norm(hidden_states, f"{layer}.input_layernorm")
            hidden_states = rounded(hidden_states + self._attention(x, f"{layer}.self_attn", rotary_cos_sin))
            x = self._norm(hidden_states, f"{layer}.post_attention_layernorm")
            mlp = self._moe_block if is_moe_layer(self._config, index) else self._mlp
            hidden_states = rounded(hidden_states + mlp(x, f"{layer}.mlp"))
        head = "model.embed_tokens" if self._config["tie_word_embeddings"] else "lm_head"
        weights, bias = self._tensors[f"{head}.weight"], self._tensors.get("lm_head.bias", 0)
        return rounded(self._norm(hidden_states, "model.norm") @ weights.T + bias)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self._tensors[f"{name}.weight"]
        normed = reference.rms_norm(x, np.ones_like(weight), self._config["rms_norm_eps"])
        return self._rounded(self._rounded(normed) * weight)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        weights = self._tensors[f"{name}.weight"]
        bias = self._tensors.get(f"{name}.bias", np.zeros(len(weights)))
        return self._rounded(reference.linear(x, reference.Matrix(weights, bias)))

    def _attention(self, x: np.ndarray, name: str, rotary_cos_sin: np.ndarray) -> np.ndarray:
        def heads(part: str) -> np.ndarray:
            return self._linear(x, f"{name}.{part}").reshape(len(x), -1, self._config["head_dim"])

        query, key = (
            self._rounded(reference.rope(heads(part), rotary_cos_sin)) for part in ("q_proj", "k_proj")
        )
        attended = self._rounded(reference.attention(query, key, heads("v_proj"), start=0))
        return self._linear(attended.reshape(len(x), -1), f"{name}.o_proj")

    def _mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (self._linear(x, f"{name}.{part}") for part in ("gate_proj", "up_proj"))
        return self._linear(self._rounded(self._rounded(reference.silu(gate)) * up), f"{name}.down_proj")

    def _moe_block(self, x: np.ndarray, name: str) -> np.ndarray:
        rounded, config = self._rounded, self._config
        scores = x @ self._tensors[f"{name}.gate.weight"].T
        bias = self._tensors[f"{name}.moe_statics.e_score_correction_bias"][0]
        topk_ids, weights = reference.moe_topk_select(scores, bias, config["moe_k"], config["moe_norm_min"])
        y = np.zeros_like(x)
        for expert in range(config["moe_num_experts"]):
            tokens, places = np.nonzero(topk_ids == expert)
            share = rounded(weights[tokens, places])[:, None] * self._mlp(
                x[tokens], f"{name}.experts.{expert}"
            )
            y[tokens] = rounded(y[tokens] + rounded(share))
        if config["moe_num_shared_experts"]:
            y = rounded(y + self._mlp(x, f"{name}.shared_experts"))
        return y


def relative_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return the relative error of each row of logits."""
    return np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
