"""ERNIE-4.5, dense and mixture of experts: its weights, and what it computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F

from ..config import ModelConfig
from ..custom_ops import MLPWeights, Projection, linear, rms_norm, swiglu_mlp
from ..layers.attention import AttentionStep, KVCache, attention
from ..layers.moe import MoEWeights, moe


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: paddle.Tensor
    qkv: Projection
    attention_output: Projection
    post_attention_norm: paddle.Tensor
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True, slots=True)
class Weights:
    #: [vocabulary, H]; also the matrix of `lm_head` when the two are tied.
    embedding: paddle.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: paddle.Tensor
    lm_head: Projection


class Ernie45:
    """The network. It holds weights only: everything about a step or a sequence comes in as an argument."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights

    def forward(
        self, token_ids: paddle.Tensor, step: AttentionStep, caches: Sequence[KVCache]
    ) -> paddle.Tensor:
        """Runs all layers over the tokens of one step.

        Args:
            token_ids: int64 [T].
            caches: one per layer; the tokens' keys and values are written there.

        Returns:
            Hidden states [T, H], for `logits`.
        """
        config = self.config
        # Each half of a layer leaves its contribution apart, and the norm that follows adds it to the stream.
        stream, update = None, F.embedding(token_ids, self.weights.embedding)
        for layer, cache in zip(self.weights.layers, caches, strict=True):
            h, stream = rms_norm(update, layer.input_norm, config.rms_norm_eps, residual=stream)
            update = attention(h, layer.qkv, layer.attention_output, step, cache)
            h, stream = rms_norm(update, layer.post_attention_norm, config.rms_norm_eps, residual=stream)
            if isinstance(layer.mlp, MoEWeights):
                update = moe(h, layer.mlp, config.moe_k, config.moe_norm_min)
            else:
                update = swiglu_mlp(h, layer.mlp)
        return stream + update

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """Hidden states [R, H] -> [R, vocabulary]."""
        h, _ = rms_norm(hidden, self.weights.final_norm, self.config.rms_norm_eps)
        return linear(h, self.weights.lm_head)
